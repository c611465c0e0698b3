"""Where the workers of a training write how far they are, and the driver reads it."""

from __future__ import annotations

import ray

MAX_NOTES = 200  # in one life of the workers; more would be a flood


@ray.remote(num_cpus=0)
class ProgressBoard:
    """Lives on the driver's node, and as long as the driver."""

    def __init__(self) -> None:
        self._sign_of_life, self._seen = 0, 0
        self._figures: dict[str, str] = {}
        self._samples: dict[str, float] = {}
        self._complaint: str | None = None
        self._notes: list[str] = []
        self._noted: set[str] = set()
        self._is_preempted = False
        self._is_stop_wanted = False

    def alive(self, num_images_seen: int) -> bool:
        """Rank 0 is at work, though it may have nothing new to tell. Returns whether it shall stop."""
        self._sign_of_life += 1
        self._seen = num_images_seen
        return self._is_stop_wanted

    def ask_to_stop(self) -> None:
        """A checkpoint, and the end of this life of the workers."""
        self._is_stop_wanted = True

    def write(self, num_images_seen: int, figures: dict[str, str]) -> None:
        self.alive(num_images_seen)
        self._figures = figures

    def read(self) -> tuple[int, int, dict[str, str], list[str]]:
        """(a number that changes as long as rank 0 lives, images seen, what to show beside them, what the
        ranks have to say that was not read yet)."""
        notes, self._notes = self._notes, []
        return self._sign_of_life, self._seen, self._figures, notes

    def note(self, rank: int, text: str) -> None:
        """A warning of a rank, for whoever follows the training; what all ranks say is heard once."""
        if text not in self._noted and len(self._noted) < MAX_NOTES:
            self._noted.add(text)
            self._notes.append(f"worker {rank}: {text}")

    def note_preemption(self) -> None:
        """The ranks stop because a node is about to go."""
        self._is_preempted = True

    def is_preempted(self) -> bool:
        return self._is_preempted

    def complain(self, text: str) -> None:
        """Why a worker ends itself; the first to say so is heard."""
        self._complaint = self._complaint or text

    def complaint(self) -> str | None:
        return self._complaint

    def add_sample(self, sample: dict[str, float]) -> None:
        """The newest system metrics of a node."""
        self._samples |= sample

    def take_samples(self) -> dict[str, float]:
        taken, self._samples = self._samples, {}
        return taken
