"""The command line: a verb finds its function, nothing else."""

import errno
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from evaclip.errors import REQUEUE_STATUS, InputError, did_you_mean

USAGE = """evaclip: train CLIP models bootstrapped from EVA, and score them zero-shot

  evaclip quickstart                         the whole job on handwritten digits, in minutes
  evaclip recipes [NAME]                     the named runs; with a name, all of its fields
  evaclip plan RECIPE --gpus N               memory, arithmetic and hours of one, before it stands in a queue
  evaclip train RECIPE [--field.sub VALUE]   run one, or continue it with --resume auto; on several GPUs:
                                             torchrun --nproc-per-node 8 -m evaclip train RECIPE
  evaclip zeroshot --dataset D [--model M]   score a trained model; `--dataset all` runs the twelve benchmarks
  evaclip frames --dataset D --data --out    take the frames of a video benchmark once
  evaclip retrieval --dataset D --model M    find captions and images: flickr30k, coco
  evaclip probe --dataset D --model M        a linear classifier and nearest neighbours on its image features
  evaclip diagnose MODEL ... --images --out  attention, heads and loss landscapes of image towers, side by side
  evaclip watch RUN                          score a run's checkpoints while it trains, and mark the best
  evaclip average RUN --last 3 --out DIR     the mean of a run's last checkpoints as a model of its own
  evaclip compare A.json B.json              two models on the same images: who is better, and is it chance
  evaclip report RUN_OR_FOLDER               all scores below a folder as one page
  evaclip export RUN DIR --to FORMAT         a model for open_clip, timm, transformers, ONNX, torch.export
  evaclip embed SOURCE OUT --model RUN       images or captions to vectors, with a table of what they stand for
  evaclip index OUT                          make them searchable: exact, or approximate with measured recall
  evaclip search OUT "a red bicycle"         by words, images, or both; JSON lines or a page of thumbnails
  evaclip serve OUT                          the same over HTTP, with a page to search with
  evaclip preflight RECIPE                   look at every GPU, file and clock that it will use, before it starts
  evaclip slurm submit RECIPE --nodes N      give it to Slurm; --dry-run shows the script
  evaclip data caption RECIPE ...            a labelled data set as image-text shards
  evaclip data plan RECIPE                   links, images, disk, hours and cost of a public set, before it is fetched
  evaclip data download RECIPE               its lists of links, downloaded to shards; goes on where it was stopped
  evaclip convert SRC DST --to LAYOUT        weights from any layout to open_clip's, timm's or EVA's
  evaclip data VERB ...                      index, check, stats, sample, reshard, filter, dedup, decontaminate, merge
  evaclip doctor                             versions, devices, attention kernels, what is missing

Each verb explains its fields with --help.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb. Returns the exit status; an error for the user is one sentence on standard error."""
    verb, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if verb in ("--help", "-h", "help"):
        print(USAGE, end="")
        return 0
    try:
        if verb not in VERBS:
            raise InputError(f"evaclip has no verb {verb!r}; {did_you_mean(verb, VERBS)}")
        return VERBS[verb](rest) or 0
    except InputError as error:
        from evaclip.log import redacted

        print(redacted(f"evaclip: {error}"), file=sys.stderr)
        return error.exit_status
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f" ({error.filename})" if error.filename else ""
        print(f"evaclip: {error.strerror}{where}; what was saved before is untouched", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("evaclip: interrupted", file=sys.stderr)
        return 130


def train(arguments: list[str]) -> int:
    """`evaclip train RECIPE [RECIPE ...] [--field.sub value]`: several are phases, one after the other."""
    from evaclip.distributed import is_main, joined
    from evaclip.recipes import RECIPES, configured
    from evaclip.train import train as run

    if not arguments or arguments[0].startswith("-"):
        known = "\n".join(f"  {name}" for name in RECIPES)
        print(f"usage: evaclip train RECIPE [--field.sub value]; each recipe lists its fields with --help\n{known}")
        return 0 if arguments and arguments[0] in ("--help", "-h") else 2
    configs = configured("train", arguments)
    with joined():
        speaks = is_main()
        for config in configs:
            outcome = run(config)
            if outcome.stopped_by is not None:
                break
            if speaks:
                print(f"done: {outcome.step:,} steps, {config.run_dir}")
        else:
            return 0
    again = [word for word in arguments if word not in ("--resume", "auto", "never")]
    if speaks:
        print(
            f"stopped by {outcome.stopped_by} at step {outcome.step:,}, everything is saved; continue with\n"
            f"  evaclip train {' '.join(again)} --resume auto"
        )
    return 130 if outcome.stopped_by == "SIGINT" else REQUEUE_STATUS


def preflight(arguments: list[str]) -> int:
    """`evaclip preflight RECIPE [--field.sub value]`, started as the training will be."""
    from evaclip.distributed import joined
    from evaclip.guard import preflight as guard
    from evaclip.recipes import RECIPES, configured

    if not arguments or arguments[0].startswith("-"):
        print("usage: evaclip preflight RECIPE [--field.sub value], as for train", *RECIPES, sep="\n  ")
        return 0 if arguments and arguments[0] in ("--help", "-h") else 2
    configs = configured("preflight", arguments)
    with joined(guard.PATIENCE):
        return max(guard.preflight(config.engine, config.data, config.run_dir) for config in configs)


def recipes(arguments: list[str]) -> None:
    """`evaclip recipes [NAME]`."""
    import inspect

    from evaclip.config import described
    from evaclip.recipes import RECIPES, recipe_named

    if arguments:
        recipe = recipe_named(arguments[0])
        print(inspect.getdoc(recipe), *described(recipe()), sep="\n")
        return
    for name, recipe in RECIPES.items():
        print(f"{name}\n    {(inspect.getdoc(recipe) or '').splitlines()[0]}")


def plan(arguments: list[str]) -> None:
    """`evaclip plan RECIPE --gpus N`."""
    import tyro

    from evaclip.config import RunConfig
    from evaclip.plan import PlanCommand, run_plan
    from evaclip.recipes import RECIPES, recipe_named

    if not arguments or arguments[0].startswith("-"):
        known = "\n".join(f"  {name}" for name in RECIPES)
        print(f"usage: evaclip plan RECIPE --gpus N [--run.field.sub value]\n{known}")
        return
    config = recipe_named(arguments[0])()

    def planned(command: tyro.conf.OmitArgPrefixes[PlanCommand], run: RunConfig = config) -> None:
        run_plan(run, command)

    tyro.cli(
        planned,
        args=arguments[1:],
        prog=f"evaclip plan {arguments[0]}",
        description=PlanCommand.__doc__,
        config=(tyro.conf.AvoidSubcommands,),
    )


def command(name: str, module: str, kind: str, function: str) -> Callable[[list[str]], int | None]:
    """The verb `name`: its arguments become a `kind`, a dataclass of `module`, which `function` of it is called with.

    The module is imported when the verb is used, so that asking for help loads nothing heavy.
    """

    def verb(arguments: list[str]) -> int | None:
        import tyro

        found: Any = importlib.import_module(module)
        outcome = getattr(found, function)(tyro.cli(getattr(found, kind), args=arguments, prog=f"evaclip {name}"))
        return outcome if isinstance(outcome, int) else None

    return verb


def data(arguments: list[str]) -> int | None:
    """`evaclip data VERB`."""
    verb, *rest = arguments or [""]
    if verb in ("", "--help", "-h"):
        print("usage: evaclip data VERB; the verbs, each with a --help of its own:", *DATA_VERBS, sep="\n  ")
        return 0 if verb else 2
    if verb not in DATA_VERBS:
        raise InputError(f"evaclip data has no verb {verb!r}; {did_you_mean(verb, DATA_VERBS)}")
    return DATA_VERBS[verb](rest)


def slurm(arguments: list[str]) -> int:
    """`evaclip slurm submit RECIPE --nodes N`."""
    from evaclip.slurm import slurm as run

    return run(arguments)


def doctor(arguments: list[str]) -> None:
    """`evaclip doctor`."""
    from evaclip.doctor import doctor as run

    if arguments:
        raise InputError("evaclip doctor takes no arguments")
    run()


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "quickstart": command("quickstart", "evaclip.quickstart", "QuickstartCommand", "run_quickstart"),
    "recipes": recipes,
    "plan": plan,
    "train": train,
    "preflight": preflight,
    "slurm": slurm,
    "zeroshot": command("zeroshot", "evaclip.evaluate", "ZeroShotCommand", "run_zero_shot"),
    "convert": command("convert", "evaclip.convert", "ConvertCommand", "run_convert"),
    "retrieval": command("retrieval", "evaclip.retrieve", "RetrievalCommand", "run_retrieval"),
    "probe": command("probe", "evaclip.probe", "ProbeCommand", "run_probe"),
    "diagnose": command("diagnose", "evaclip.diagnostics.command", "DiagnoseCommand", "run_diagnose"),
    "watch": command("watch", "evaclip.watch", "WatchCommand", "run_watch"),
    "average": command("average", "evaclip.average", "AverageCommand", "run_average"),
    "compare": command("compare", "evaclip.evals.comparison", "CompareCommand", "run_compare"),
    "report": command("report", "evaclip.report.summary", "ReportCommand", "run_report"),
    "export": command("export", "evaclip.export.command", "ExportCommand", "run_export"),
    "embed": command("embed", "evaclip.search.embed", "EmbedCommand", "run_embed"),
    "index": command("index", "evaclip.search.indexing", "IndexCommand", "run_index"),
    "search": command("search", "evaclip.search.query", "SearchCommand", "run_search"),
    "serve": command("serve", "evaclip.search.serve", "ServeCommand", "run_serve"),
    "frames": command("frames", "evaclip.evals.frame_cache", "FramesCommand", "run_frames"),
    "data": data,
    "doctor": doctor,
}
DATA_VERBS: dict[str, Callable[[list[str]], int | None]] = {
    "caption": command("data caption", "evaclip.curate.caption", "CaptionCommand", "run_caption"),
    "plan": command("data plan", "evaclip.curate.plan", "PlanCommand", "run_plan"),
    "download": command("data download", "evaclip.curate.download", "DownloadCommand", "run_download"),
    "synth": command("data synth", "evaclip.curate.synth", "SynthCommand", "run_synth"),
    "index": command("data index", "evaclip.curate.index", "IndexCommand", "run_index"),
    "check": command("data check", "evaclip.curate.check", "CheckCommand", "run_check"),
    "stats": command("data stats", "evaclip.curate.stats", "StatsCommand", "run_stats"),
    "sample": command("data sample", "evaclip.curate.sample", "SampleCommand", "run_sample"),
    "reshard": command("data reshard", "evaclip.curate.reshard", "ReshardCommand", "run_reshard"),
    "filter": command("data filter", "evaclip.curate.filter", "FilterCommand", "run_filter"),
    "dedup": command("data dedup", "evaclip.curate.dedup", "DedupCommand", "run_dedup"),
    "hash": command("data hash", "evaclip.curate.decontaminate", "HashCommand", "run_hash"),
    "decontaminate": command(
        "data decontaminate", "evaclip.curate.decontaminate", "DecontaminateCommand", "run_decontaminate"
    ),
    "merge": command("data merge", "evaclip.curate.merge", "MergeCommand", "run_merge"),
}
