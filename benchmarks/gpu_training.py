"""How fast a training runs on one GPU, and how far its step is from what the chip can do.

    python -m benchmarks.gpu_training --content CORPUS --style CORPUS --out DIR [--preset NAME] [--set ...]

Writes DIR/gpu_training.json and .md: images/s and milliseconds a step, with decoding in loader workers and
with resident corpora, as written and compiled; the arithmetic of a step, counted, over the rate that large
products of matrices and the widest convolution of the loss reach on this chip; and which kernels the time
goes into."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from nst.presets import PRESETS, resolve_config
from nst.standalone import open_for
from nst.train import Session, prepare

NUM_WARM_UP, NUM_STEPS, NUM_PROFILED = 12, 100, 10
VARIANTS = {
    "workers decode, as written": {"decode": "cpu", "compile": "false"},
    "resident, as written": {"decode": "resident", "compile": "false"},
    "resident, compiled": {"decode": "resident", "compile": "true"},
}


def one_step(session: Session) -> None:
    """What `nst.train.train` does in a step, without its reports."""
    batch = next(session.batches).to(session.objective.device)
    torch.manual_seed(session.state.step)
    session.objective.step(batch, progress=0.1)
    session.state.step += 1
    session.state.num_images_seen += batch.num_images
    session.objective.update_ema(batch.num_images, session.state.num_images_seen)


def milliseconds(run: Callable[[], object], num_times: int) -> float:
    """Of one call, by the device's own clock."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(num_times):
        run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / num_times


def measured_peaks(num_images: int, size: int) -> dict[str, float]:
    """TFLOP/s in bf16 on random numbers: a product of two 8192 x 8192 matrices, and the loss's second
    convolution (64 to 64 channels at full size), one of the two that have most of its arithmetic."""
    first, second = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    pictures = torch.randn(num_images, 64, size, size, device="cuda", dtype=torch.bfloat16)
    pictures = pictures.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device="cuda", dtype=torch.bfloat16)
    weight = weight.contiguous(memory_format=torch.channels_last)
    runs: dict[str, tuple[Callable[[], object], float]] = {
        "matrix_product": (lambda: first @ second, 2 * 8192**3),
        "convolution": (
            lambda: torch.nn.functional.conv2d(pictures, weight, padding=1),
            2 * num_images * size**2 * 64 * 64 * 9,
        ),
    }
    peaks = {}
    for name, (run, num_operations) in runs.items():
        milliseconds(run, 5)
        peaks[name] = num_operations / milliseconds(run, 20) / 1e9
    return peaks


def kernels(session: Session) -> list[tuple[str, float, float]]:
    """(name, milliseconds a step, launches a step), the longest first."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(NUM_PROFILED):
            one_step(session)
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    found = [
        (event.key, event.self_device_time_total / 1e3 / NUM_PROFILED, event.count / NUM_PROFILED)
        for event in events
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(found, key=lambda one: -one[1])


def measure(options: argparse.Namespace, changes: dict[str, str]) -> dict[str, Any]:
    assignments = [*options.assignments, *(f"{name}={value}" for name, value in changes.items())]
    config = resolve_config(options.preset, None, assignments)
    content, style = open_for("content", options.content), open_for("style", options.style)
    began = time.monotonic()
    session = prepare(config, content, style, device="cuda", num_loader_workers=options.loader_workers)
    ready = time.monotonic() - began
    for _ in range(NUM_WARM_UP):
        one_step(session)
    torch.cuda.synchronize()
    warm = time.monotonic() - began - ready
    torch.cuda.reset_peak_memory_stats()
    a_step = milliseconds(lambda: one_step(session), NUM_STEPS)
    num_images = session.state.num_images_seen / session.state.step
    found = {
        "seconds_to_begin": ready,
        "seconds_to_warm_up": warm,
        "milliseconds_a_step": a_step,
        "images_per_second": num_images / a_step * 1e3,
        "images_a_step": num_images,
        "size": config.batch.size,
        "gigabytes_at_most": torch.cuda.max_memory_allocated() / 1e9,
    }
    if changes["compile"] == "false" and changes["decode"] == "resident":
        with FlopCounterMode(display=False) as counter:
            one_step(session)
        found["tera_operations_a_step"] = counter.get_total_flops() / 1e12
    if changes["decode"] == "resident":
        found["kernels"] = kernels(session)
        found["milliseconds_of_kernels"] = sum(one[1] for one in found["kernels"])
        found["kernels_a_step"] = sum(one[2] for one in found["kernels"])
    return found


def report(found: dict[str, Any]) -> str:
    measured = found["variants"]
    counted = next(v["tera_operations_a_step"] for v in measured.values() if "tera_operations_a_step" in v)
    lines = [
        f"One {found['device']}, torch {found['torch']}; {found['setting']}.",
        "",
        "| | images/s | ms a step | of it kernels | launches | begins in | GB at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, one in measured.items():
        of_kernels = f"{one['milliseconds_of_kernels']:.2f} ms" if "kernels" in one else ""
        launches = f"{one['kernels_a_step']:.0f}" if "kernels" in one else ""
        begins = one["seconds_to_begin"] + one["seconds_to_warm_up"]
        lines.append(
            f"| {name} | {one['images_per_second']:.0f} | {one['milliseconds_a_step']:.2f} | {of_kernels} | "
            f"{launches} | {begins:.0f} s | {one['gigabytes_at_most']:.1f} |"
        )
    best = min(one["milliseconds_a_step"] for one in measured.values())
    lines += ["", f"A step is {counted * 1e3:.0f} billion operations. Measured on this chip in bf16:", ""]
    for name, peak in found["peaks"].items():
        floor = counted / peak * 1e3
        share = floor / best
        lines.append(
            f"- {name.replace('_', ' ')}: {peak:.0f} TFLOP/s, so {floor:.2f} ms at least, {share:.0%} of the "
            "fastest step above"
        )
    lines += ["", "Where the compiled step's time goes:", "", "| kernel | ms | launches |", "|---|---|---|"]
    compiled = measured.get("resident, compiled", {}).get("kernels", [])
    lines += [f"| `{name[:90]}` | {time:.3f} | {launches:.0f} |" for name, time, launches in compiled[:15]]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--content", required=True)
    parser.add_argument("--style", required=True)
    parser.add_argument("--preset", default="perceptual", choices=sorted(PRESETS))
    parser.add_argument("--set", action="append", default=[], dest="assignments")
    parser.add_argument("--loader-workers", type=int, default=4)
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--out", required=True, type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_training: there is no CUDA device", file=sys.stderr)
        return 2
    config = resolve_config(options.preset, None, options.assignments)
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "setting": f"preset {options.preset}, {' '.join(options.assignments) or 'as it is'}",
        "peaks": measured_peaks(config.batch.num_classes * config.batch.works_per_class, config.batch.size),
        "variants": {},
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.variants:
        found["variants"][name] = measure(options, VARIANTS[name])
        torch.cuda.empty_cache()
        print(name, {k: v for k, v in found["variants"][name].items() if k != "kernels"}, flush=True)
    (options.out / "gpu_training.json").write_text(json.dumps(found, indent=2))
    text = report(found)
    (options.out / "gpu_training.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
