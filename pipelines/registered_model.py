"""The code of a registered model: MLflow runs this file where the model is served, with the `nst` package
that was registered beside it. Takes pictures as bytes of any usual format and gives PNG bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext


class RegisteredStylizer(PythonModel):
    """One row, one picture: columns `content` and `style` hold bytes. Parameters: `strength` 0..1, `colors`
    "style" or "content", `max_side` in px (0: the content's own size)."""

    def load_context(self, context: PythonModelContext) -> None:
        """Raises OSError if weights or configuration are not those that were registered, or if they do not
        draw on this machine what they drew then."""
        # Not above: MLflow puts the registered package on the path just before this call.
        from nst.checkpoint import model_digest
        from nst.golden import check_golden, golden_digest
        from nst.stylize import Stylizer

        checkpoint_dir = context.artifacts["checkpoint"]
        expected, found = context.model_config["digest"], model_digest(checkpoint_dir)
        if found != expected:
            raise OSError(
                f"{checkpoint_dir} was altered after it was registered: its digest is {found[:12]}, not "
                f"{expected[:12]}"
            )
        golden_dir = context.artifacts["golden"]
        expected, found = context.model_config["golden_digest"], golden_digest(golden_dir)
        if found != expected:
            raise OSError(
                f"{golden_dir} was altered after it was registered: its digest is {found[:12]}, not "
                f"{expected[:12]}"
            )
        self._stylizer = Stylizer.load(checkpoint_dir)
        check_golden(self._stylizer, golden_dir)

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """A frame with the column `stylized`: PNG bytes, a row each. Raises MlflowException, which a server
        answers with status 400, naming a row that holds no picture, or an option out of range."""
        options = dict(params or {})
        options["max_side"] = options.get("max_side") or None
        rows = zip(model_input["content"], model_input["style"], strict=True)
        try:
            return pd.DataFrame(
                {"stylized": [self._draw(*pair, row, options) for row, pair in enumerate(rows)]}
            )
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from error

    def _draw(self, content: bytes, style: bytes, row: int, options: dict[str, Any]) -> bytes:
        from nst.images import encode_image

        pixels = self._stylizer(
            _pixels(content, f"content of row {row}"),
            _pixels(style, f"style of row {row}")[..., :3],
            **options,
        )
        alpha = pixels[..., 3] if pixels.shape[2] == 4 else None
        return encode_image(pixels[..., :3], alpha, "png")


def _pixels(data: bytes, name: str) -> np.ndarray:
    """uint8 [H, W, 3 or 4], upright and in sRGB."""
    from nst.images import ImageError, decode_image

    try:
        image = decode_image(data)
    except ImageError as error:
        raise ValueError(f"{name}: {error}") from error
    return image.rgb if image.alpha is None else np.dstack([image.rgb, image.alpha])


set_model(RegisteredStylizer())
