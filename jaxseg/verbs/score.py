"""The verb `eval` of a network: scores a run on a split and reports it."""

from collections.abc import Sequence
from pathlib import Path

import jax

from jaxseg.data import catalog
from jaxseg.evaluate import evaluate, make_eval_step, open_source
from jaxseg.inference import settings
from jaxseg.life import Life
from jaxseg.log import say
from jaxseg.report import place, report, table
from jaxseg.saver import Saver
from jaxseg.train import load_variables


def score(
    workdir: Path,
    split: str | None = None,
    save: bool = False,
    overrides: Sequence[tuple[str, str]] = (),
) -> int:
    """Scores a run on a split, by default its validation split; another's report is `place`'s.

    save: also the predictions, as WORKDIR/predictions/SPLIT/NAME.png. overrides: of the run's
    config, (dotted key, text); without eval.boundary among them, boundaries are scored. Ends the
    process where nothing goes on for the run's train.watchdog seconds.
    """
    config, mesh, variables, step, _ = load_variables(workdir, overrides)
    edges = config.eval.boundary or "eval.boundary" not in dict(overrides)
    split = split or config.data.eval_split
    source = open_source(config, split, catalog.read_classes(workdir / "classes.json"))
    folder, saved = place(workdir, split, config), workdir / "predictions" / split
    saver = Saver(saved, step, source.classes, settings(config), config) if save else None
    with Life(config.train.watchdog, signals=()) as life:
        eval_step = life.watched(make_eval_step(config, mesh, edges=edges))
        result = evaluate(eval_step, variables, source, config, mesh, saver)
    say(table(result.scores, source.classes))
    if jax.process_index() == 0:
        report(folder, step, result, source, split)
    say(
        f"step {step}, {len(source)} images of {split} (sizes: {result.sizes}, compilations: "
        f"{result.compilations}); details in {folder / 'eval.json'}"
        + (f", predictions in {saved}" if save else "")
    )
    return 0
