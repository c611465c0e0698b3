"""Whether the paper's claims hold on real pictures, at a size that a CPU can do: one part of the method taken
away at a time, several seeds, and measures on works and artists that no training has seen.

    python -m benchmarks.ablation --pictures FOLDER --vgg FILE

`corpora` splits the pictures, `variants` says what is trained, `run` trains it, `measure` measures each run,
and `report` writes it down."""
