"""`nst`, the command line: one verb a stage. A stage's module is imported when its verb is used, so that
`nst --help` answers at once."""

from __future__ import annotations

import importlib

import click

# verb -> (module:command, what it does)
VERBS = {
    "demo": ("pipelines.demo:demo", "The whole chain on this machine, with real images."),
    "shard": (
        "pipelines.shard_corpus:shard",
        "Images in a folder or bucket -> a corpus of WebDataset shards.",
    ),
    "index": ("pipelines.index_corpus:index", "Adopt WebDataset tars that something else wrote."),
    "inspect": ("pipelines.inspect_corpus:inspect", "What is in a corpus; --verify reads every byte back."),
    "train": ("pipelines.train_gan:train", "Train a model from a content and a style corpus."),
    "evaluate": ("pipelines.evaluate_model:evaluate", "Measure models beside their baselines."),
    "promote": ("pipelines.promote_model:promote", "Make a version the champion, if the gate agrees."),
    "rollback": ("pipelines.promote_model:rollback", "Bring the previous champion back."),
    "history": (
        "pipelines.show_history:history",
        "Who promoted what, and where a version or bucket comes from.",
    ),
    "stylize": ("pipelines.stylize_bucket:stylize", "Every image of a folder or bucket in the given styles."),
    "submit": ("pipelines.submit_job:submit", "Run a verb as a job on a Ray cluster."),
    "jobs": ("pipelines.submit_job:jobs", "List the jobs of a cluster."),
    "logs": ("pipelines.submit_job:logs", "Print and follow a job's log."),
    "stop": ("pipelines.submit_job:stop", "Stop a job."),
    "doctor": ("pipelines.doctor:doctor", "Check storage, Ray, MLflow, GPU and versions."),
}


def find_verb(name: str) -> click.Command:
    module, attribute = VERBS[name][0].split(":")
    return getattr(importlib.import_module(module), attribute)


class LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return find_verb(cmd_name) if cmd_name in VERBS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(verb, text) for verb, (_, text) in VERBS.items()])


@click.command(cls=LazyGroup)
@click.version_option(package_name="nst")
def main() -> None:
    """Artistic style transfer as a pipeline: shard, train, evaluate, promote, stylize.

    Start with `nst demo`. Every verb has --help with examples and --json for programs.
    """


if __name__ == "__main__":
    main()
