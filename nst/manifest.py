"""`corpus.json`: what a corpus consists of, with the checksums that everything else is held against."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from nst.planning import FORMAT_VERSION, digest_of

MANIFEST_NAME = "corpus.json"
FAILURES_NAME = "failures.parquet"
LEDGER_PREFIX = "_nst/inputs"
REMEDY = "delete it and run the `nst shard` that made it again, or fetch it again"


class CorpusError(OSError):
    """A part of a corpus is missing, cut or altered. The message names it and says what helps."""


@dataclass(frozen=True, kw_only=True)
class ShardInfo:
    """A shard: `tar` and `index` are posix paths relative to the corpus; `num_bytes` and `sha256` are the
    tar's, `index_num_bytes` and `index_sha256` the index's. `plan` is the digest of the inputs and settings
    that it was made from ("" for an adopted tar)."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    tar: str
    index: str
    index_num_bytes: int
    index_sha256: str
    plan: str = ""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """`labels` counts the samples by label, sorted by label: a label's id is its place there. `image_size` is
    the shorter side that larger images were shrunk to (of adopted tars: their median shorter side). `files`
    holds the sha256 of the other files that belong to the corpus. `settings` has what the shards were made
    with; `settings["adopted"]` is true where another program wrote the tars.
    """

    format_version: int = FORMAT_VERSION
    role: str
    image_size: int
    num_samples: int
    labels: dict[str, int]
    shards: tuple[ShardInfo, ...]
    settings: dict[str, Any]
    source: str
    num_failures: int = 0
    files: dict[str, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """sha256 of what a reader sees: equal digests mean the same samples in the same order."""
        shards = [[shard.name, shard.num_samples, shard.sha256] for shard in self.shards]
        return digest_of(
            {"version": self.format_version, "role": self.role, "size": self.image_size, "shards": shards}
        )

    @property
    def ledger(self) -> str | None:
        """The file that says what became of every input. Its name holds its checksum, so that two runs never
        write different ones under the same name. None in an adopted corpus."""
        return next((name for name in self.files if name.startswith(LEDGER_PREFIX)), None)

    @property
    def is_adopted(self) -> bool:
        return bool(self.settings.get("adopted", False))

    def to_json(self) -> str:
        """The text of `corpus.json`. Its last entry is a checksum over all the others."""
        content = asdict(self) | {"shards": [_shard_to_json(shard) for shard in self.shards]}
        content["digest"] = self.digest
        content["checksum"] = digest_of(content)
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, uri: str = MANIFEST_NAME) -> Manifest:
        """Raises CorpusError if the text is damaged, ValueError if it is of another version."""
        try:
            content = json.loads(text)
            version = content["format_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise CorpusError(f"{uri} is cut or altered ({error}); {REMEDY}") from None
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{uri} has format version {version}, this program reads {FORMAT_VERSION}; shard it again"
            )
        checksum, digest = content.pop("checksum", None), content.get("digest")
        if checksum != digest_of(content):
            raise CorpusError(f"{uri} is altered: its checksum does not fit; {REMEDY}")
        del content["digest"]
        content["shards"] = tuple(_shard_from_json(shard) for shard in content["shards"])
        manifest = cls(**content)
        if manifest.digest != digest or manifest.num_samples != sum(manifest.labels.values()):
            raise CorpusError(f"{uri} contradicts itself; {REMEDY}")
        return manifest


def _shard_to_json(shard: ShardInfo) -> dict[str, Any]:
    entry = asdict(shard)
    entry["samples"], entry["bytes"] = entry.pop("num_samples"), entry.pop("num_bytes")
    order = ("name", "samples", "bytes", "sha256", "tar", "index", "index_num_bytes", "index_sha256", "plan")
    return {name: entry[name] for name in order}


def _shard_from_json(entry: Mapping[str, Any]) -> ShardInfo:
    values = dict(entry)
    for key in (values["tar"], values["index"]):
        if key.startswith("/") or ".." in key.split("/"):
            raise CorpusError(f"{MANIFEST_NAME} names {key!r}, which lies outside its corpus; do not use it")
    return ShardInfo(num_samples=values.pop("samples"), num_bytes=values.pop("bytes"), **values)
