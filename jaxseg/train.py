"""Training: the state, one step of it, and the only loop."""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jaxseg import checkpoint, faults, models, plots, sharding
from jaxseg import config as configs
from jaxseg.compiler import options
from jaxseg.data import pipeline
from jaxseg.data.feed import Feed
from jaxseg.data.sources import First, SkipBad
from jaxseg.errors import InputError
from jaxseg.evaluate import (
    check_images,
    check_labels,
    evaluate,
    make_eval_step,
    open_source,
    padding,
)
from jaxseg.guard import Guard
from jaxseg.inference import cast
from jaxseg.life import STOPPED, Life, Stopped
from jaxseg.log import SHOWN, Log, say
from jaxseg.ops.augment import augment
from jaxseg.ops.image import normalise
from jaxseg.optim import freeze, make_optimizer, schedule
from jaxseg.pretrained import filled, flat, load_backbone
from jaxseg.remat import passes
from jaxseg.report import report, reported_step, table
from jaxseg.workdir import check_space, load_config, lock, prepare

# The keys of config.data that the device obeys where it augments.
ON_DEVICE = "crop mean scale scale_step flip flip_vertical photometric hue".split()


@flax.struct.dataclass
class TrainState:
    """Everything that changes in training: a tree of arrays, no functions."""

    step: jax.Array  # int32, finished steps
    skipped: jax.Array  # int32, those of them that were not finite and changed nothing
    params: Any  # float32
    batch_stats: Any  # running statistics of the norms
    opt_state: Any
    ema: Any  # moving averages of params and batch_stats; empty where train.ema is 0

    def variables(self) -> dict[str, Any]:
        """What `Model.apply` takes to evaluate."""
        return self.ema or {"params": self.params, "batch_stats": self.batch_stats}

    def holding(self, variables: dict[str, Any]) -> "TrainState":
        """The state with these variables, its moving averages at the same values."""
        return self.replace(**variables, ema=jax.tree.map(jnp.copy, variables) if self.ema else {})


def init_state(
    config: ConfigDict, model: nn.Module, tx: optax.GradientTransformation
) -> TrainState:
    """A fresh state from config.train.seed. Trace it with jax.eval_shape for its shapes."""
    image = jnp.zeros((1, *config.data.crop, config.data.channels))
    variables = model.init(jax.random.key(config.train.seed), image, train=False)
    variables = {"batch_stats": {}, **variables}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=tx.init(variables["params"]),
        ema=jax.tree.map(jnp.copy, variables) if config.train.ema else {},
    )


def train_step(
    state: TrainState,
    batch: dict[str, jax.Array],
    *,
    config: ConfigDict,
    model: nn.Module,
    loss: Callable,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One optimizer step on a batch: (new state, scalars to log).

    A step whose loss or gradient is not finite leaves everything unchanged but the step's number
    and the count of such steps. One with a true `stop` [B] in its batch leaves all unchanged: so a
    process tells the others that it was asked to stop.
    """
    parts, apply, loss = passes(config.train, model.apply, loss)

    def objective(params: Any, batch_stats: Any, part: dict, rng: jax.Array) -> tuple:
        params = freeze(config.optim, params)
        x = normalise(part["image"], config.data.mean, config.data.std)
        part = {**part, "rng": jax.random.fold_in(rng, 1)}  # for what a loss draws
        outputs, updated = apply(
            {"params": cast(params, config.train.compute_dtype), "batch_stats": batch_stats},
            x.astype(config.train.compute_dtype),
            *(model.inputs(part) if hasattr(model, "inputs") else ()),
            train=True,
            rngs={"dropout": rng},
            mutable=["batch_stats"],
        )
        value, logs = loss(outputs, part)
        return value, (updated.get("batch_stats", {}), logs)

    def gradient(batch_stats: Any, part: tuple[dict, jax.Array]) -> tuple[Any, tuple]:
        grads, (batch_stats, logs) = jax.grad(objective, has_aux=True)(
            state.params, batch_stats, *part
        )
        return batch_stats, (grads, logs)

    stop = jnp.any(batch["stop"]) if "stop" in batch else None
    batch = augment_batch({k: v for k, v in batch.items() if k != "stop"}, state.step, config)
    rng = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
    if parts == 1:
        batch_stats, (grads, logs) = gradient(state.batch_stats, (batch, rng))
    else:  # part k takes examples k, k + parts, ...: each device splits what it holds

        def split(x: jax.Array) -> jax.Array:
            return x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1)

        stacked = (jax.tree.map(split, batch), jax.random.split(rng, parts))
        batch_stats, collected = jax.lax.scan(gradient, state.batch_stats, stacked)
        grads, logs = jax.tree.map(lambda x: jnp.mean(x, axis=0), collected)

    grads = faults.spoiled(grads, batch)  # themselves, unless this is a rehearsal
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new = state.replace(params=params, batch_stats=batch_stats, opt_state=opt_state, ema={})
    taken = state.step - state.skipped
    if config.train.ema:  # a young average forgets sooner, else it would hold its first weights
        decay = jnp.minimum(config.train.ema, (1 + taken) / (10 + taken))
        new = new.replace(ema=optax.incremental_update(new.variables(), state.ema, 1 - decay))
    norm = optax.tree.norm(grads)
    finite = jnp.isfinite(logs["loss"]) & jnp.isfinite(norm)
    kept = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    kept = kept.replace(step=state.step + 1, skipped=state.skipped + ~finite)
    if stop is not None:
        kept = jax.tree.map(lambda a, b: jnp.where(stop, a, b), state, kept)
        logs = {**logs, "stop": stop}
    # The optimizer's own schedule counts the steps that it took.
    lr = schedule(config.optim, config.train.steps)(taken)
    return kept, {**logs, "lr": lr, "grad_norm": norm, "skipped": kept.skipped}


def augment_batch(batch: dict[str, jax.Array], step: jax.Array, config: ConfigDict) -> dict:
    """The batch of that step as the network sees it: what the host left to do is done here.

    It depends on train.seed, the step and the examples' positions in the stream alone.
    """
    if config.data.augment_on == "host":
        return batch
    rng = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.train.seed), step), 0)
    return augment(batch, rng, **{key: config.data[key] for key in ON_DEVICE})


def build(config: ConfigDict, mesh: Mesh) -> tuple[TrainState, Callable, Callable]:
    """(shapes and shardings of the state, jitted init(), train_step(state, batch) to jit)."""
    model, loss, _ = models.build(config)
    loss = faults.poisoned(loss)  # itself, unless this is a rehearsal
    image = jax.ShapeDtypeStruct((1, *config.data.crop, config.data.channels), jnp.float32)
    variables = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), image)
    tx = make_optimizer(config.optim, config.train.steps, variables["params"])
    init = partial(init_state, config, model, tx)
    shapes = jax.eval_shape(init)
    shardings = sharding.state_sharding(shapes, mesh)
    target = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
    )
    step = partial(train_step, config=config, model=model, loss=loss, tx=tx)
    step = sharding.traced_on(mesh, step)
    init = jax.jit(init, out_shardings=shardings, compiler_options=options(once=True))
    return target, init, step


def check_sizes(config: ConfigDict, mesh: Mesh) -> None:
    """Raises InputError where the crop does not fit the network, or the batch the devices."""
    model, _, _ = models.build(config)
    if hasattr(model, "check_crop"):
        model.check_crop(config.data.crop)
    parts = sharding.batch_parts(mesh) * config.train.accumulate
    if config.train.batch % parts:
        raise InputError(
            f"train.batch is {config.train.batch}: must be divisible by {parts}, the devices along "
            "data and fsdp times train.accumulate"
        )
    rows, space = config.data.crop[0], mesh.shape["space"]
    if rows % space:
        raise InputError(f"data.crop has {rows} rows: must be divisible by mesh.space, {space}")


def jit_step(step: Callable, state: TrainState, batch: dict, mesh: Mesh) -> Callable:
    """The jitted train_step(state, batch); reuses the state's memory."""
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(batch, mesh)),
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )


def compile_step(step: Callable, state: TrainState, batch: dict, mesh: Mesh) -> Callable:
    """The compiled train_step(state, batch). Says how long it took."""
    say("compiling ...", end=" ")
    begin = time.perf_counter()
    compiled = jit_step(step, state, batch, mesh).lower(state, batch).compile(options())
    kept = jax.config.jax_compilation_cache_dir
    say(f"{time.perf_counter() - begin:.0f} s, once" + (f"; kept in {kept}" if kept else ""))
    return compiled


def train(config: ConfigDict, workdir: Path, dry_run: bool = False) -> int:
    """Trains, or goes on training, the run of `workdir`; returns the exit code, 0 or STOPPED.

    dry_run builds everything, runs one step and one batch of the evaluation, and leaves nothing
    behind. Raises FloatingPointError where training diverges and RestartError where the same
    command would go on.
    """
    mesh = sharding.make_mesh(config.mesh)
    check_sizes(config, mesh)
    if dry_run:
        return rehearse(config, mesh, *open_sources(config))
    with Life(config.train.watchdog) as life:
        source, validation = open_sources(config)  # where a signal may come, too
        with lock(workdir):
            faults.strike("start")
            prepare(config, workdir, validation.classes, len(source))
            try:
                run(config, workdir, mesh, source, validation, life)
            except Stopped:
                return STOPPED
    if isinstance(source, SkipBad) and source.bad:
        say(source.summary())
    return 0


def open_sources(config: ConfigDict) -> tuple[Any, Any]:
    """The readers of the splits to train and to evaluate on."""
    source = open_source(config, config.data.train_split)
    source = SkipBad(source) if config.data.on_bad_example == "skip" else source
    check_labels(source)
    validation = open_source(config, config.data.eval_split)
    check_images(config, validation)
    return source, validation


def rehearse(config: ConfigDict, mesh: Mesh, source: Any, validation: Any) -> int:
    """One step on the first batch, from a fresh state, and an evaluation of one batch after it."""
    _, init, step_function = build(config, mesh)
    eval_step = make_eval_step(config, mesh)
    state = start_from(config, init())
    say_what(config, state, source, validation)
    with closing(open_batches(config, source)) as batches:
        first = sharding.put_batch(faults.poison(next(batches), 1), mesh)
        state, logs = compile_step(step_function, state, first, mesh)(state, first)
    evaluate(eval_step, state.variables(), First(validation, config.eval.batch), config, mesh)
    say(f"dry run: one step, loss {float(logs['loss']):.4f}, and one batch of the evaluation")
    return 0


def say_what(config: ConfigDict, state: TrainState, source: Any, validation: Any) -> None:
    """The line that begins a training: the network, the data, the devices."""
    count = sum(x.size for x in jax.tree.leaves(state.params))
    say(
        f"{config.model.name} on {config.data.dataset}: {count:,} parameters, "
        f"{len(source)} training and {len(validation)} validation images, "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    if note := padding(config, source):
        say(note)


def open_batches(config: ConfigDict, source: Any, start: int = 0) -> Iterator[dict]:
    """This process' batches from `start` on."""
    process, every = (jax.process_index(), jax.process_count()), config.train
    batches = pipeline.train_batches(
        source, config.data, batch=every.batch, seed=every.seed, start=start, process=process
    )
    return faults.stalled(batches, start + 1)


def run(
    config: ConfigDict, workdir: Path, mesh: Mesh, source: Any, validation: Any, life: Life
) -> None:
    """Goes on from the newest checkpoint to the last step. Raises Stopped after a signal.

    All processes do the same at the same step: what decides is in the logs of the step before,
    which are the same everywhere, and of which none has to wait for the step that runs.
    """
    every, last, alone = config.train, config.train.steps, jax.process_count() == 1
    target, init, step_function = build(config, mesh)
    eval_step = life.watched(make_eval_step(config, mesh))
    state, step = resume(workdir, target)
    shift = checkpoint.position(workdir, step) - step  # batches that roll-backs passed over
    log, failures = Log(workdir, step, last, every.batch), []
    reported = partial(reported_step, workdir, config.data.eval_split)

    def validate() -> None:
        life.beat(f"the evaluation of step {step}")
        try:
            with log.paused():
                result = evaluate(eval_step, state.variables(), validation, config, mesh)
                log.eval(step, result.scores)
                if jax.process_index() == 0:
                    report(workdir, step, result, validation, config.data.eval_split)
                    with log.tolerated():
                        plots.curves(log.path, workdir / "curves.png", SHOWN)
        except Stopped:
            raise
        except Exception as error:  # a broken evaluation costs no training
            if not alone:  # the others are in the middle of it
                raise
            failures.append(error)
            log.say(f"step {step}: the evaluation failed, training goes on: {error}")
            return
        if step == last:
            say(table(result.scores, validation.classes))
            say(f"pictures in {workdir / 'pictures'}, curves in {workdir / 'curves.png'}")

    def save() -> None:
        life.beat(f"the save of step {step}")
        with log.paused():
            digest = saver.save(step, state, step + shift)
        if digest:
            log.write("checkpoint", step, {"fingerprint": digest})
            guard.saved(step)

    def draw() -> dict[str, jax.Array]:
        host = log.wait(batches)
        faults.strike(step + shift + 1)
        if alone and life.signal:
            raise Stopped
        return sharding.put_batch(life.marked(faults.poison(host or first, step + shift + 1)), mesh)

    if step >= last:
        with log:
            if reported() < last:  # it was stopped in the last one
                validate()
        say(
            f"{workdir} is finished, at step {step}: `eval` scores it again, `predict` uses it; "
            f"pictures in {workdir / 'pictures'}"
        )
        if failures:
            raise failures[0]
        return
    state = state or start_from(config, init())
    say_what(config, state, source, validation)
    check_space(workdir, sum(x.nbytes for x in jax.tree.leaves(state)), every.keep)
    guard, logs = Guard(every.spike, workdir), None
    guard.kept = step > 0
    feed = Feed(open_batches(config, source, step + shift), lambda: alone and life.asked())
    with log, closing(feed), closing(checkpoint.Saver(workdir, every.keep)) as saver:
        try:
            if due(step, every.eval_every) and reported() < step:
                validate()  # it was stopped there
            first = next(feed)
            if first is None:
                raise Stopped
            life.beat("the compilation")
            faults.strike("compile")
            example = sharding.put_batch(life.marked(faults.poison(first, 0)), mesh)
            step_fn = compile_step(step_function, state, example, mesh)
            batches, feed.asked = itertools.chain([first], feed), life.asked
            log.begin(step)
            while step < last:
                state = faults.flipped(state, step + shift + 1)
                before, (state, logs) = logs, step_fn(state, draw())
                step += 1
                wrong, stop = guard.look(before)  # one step runs, one waits
                seen, ends = step - 1, step == last
                if ends and not (stop or guard.spent):  # no later step looks at this one
                    (wrong, stop), seen = guard.look(logs), step
                life.beat(f"step {step + 1} or the wait for its batch")
                log.flush()
                saver.settle()
                saves = ends or (due(step, every.checkpoint_every) and not guard.bad)
                evaluates = ends or due(step, every.eval_every)
                if stop or ((saves or evaluates) and logs.get("stop", False)):
                    raise Stopped
                if wrong and guard.bad == 1:
                    log.say(f"step {seen}: {wrong}")
                if guard.spent or (ends and guard.broken):
                    good = guard.roll(seen, wrong)
                    state, back = saver.roll_back(target, good)
                    state = state or start_from(config, init())
                    log.roll_back(seen, back, wrong)
                    shift, step, logs = shift + step - back, back, None
                    continue
                if ends or due(step, every.log_every):
                    log.train(step, logs)
                if saves:
                    save()
                if evaluates:
                    validate()
        except Stopped:
            step = int(state.step)
            guard.look(logs)
            if guard.broken:
                _, step = saver.roll_back(target, guard.good(step))
                did = f"the loss has leapt, so nothing was saved; the newest good step is {step}"
            else:
                save()
                saver.finish()
                did = f"saved step {step}"
            log.flush()
            log.say(f"{life.name()}: {did} in {workdir}; the same command goes on from there")
            raise
        saver.finish()
    if failures:
        raise failures[0]


def resume(workdir: Path, target: TrainState) -> tuple[TrainState | None, int]:
    """(state, step) of the newest good checkpoint, or (None, 0) where there is none."""
    if not checkpoint.exists(workdir):
        return None, 0
    with checkpoint.manager(workdir) as manager:
        state, step, digest = checkpoint.restore(manager, target)
    checkpoint.set_aside(workdir, after=step)
    say(f"resuming at step {step}, fingerprint {digest}")
    return state, step


def due(step: int, every: int) -> bool:
    return step > 0 and every > 0 and step % every == 0


def start_from(config: ConfigDict, state: TrainState) -> TrainState:
    """A fresh state with the weights that config.init names."""
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    if config.init.backbone:
        variables = load_backbone(Path(config.init.backbone), config, variables)
    if config.init.workdir:
        variables = warm_start(Path(config.init.workdir), variables)
    return state.holding(variables)


def warm_start(workdir: Path, variables: Any) -> Any:
    """`variables` with those of the run's newest checkpoint where path and shape agree.

    Says what was taken and what is new. Raises InputError where nothing agrees.
    """
    have, mine = flat(load_variables(workdir)[2]), flat(variables)
    taken = {k: v for k, v in have.items() if k in mine and mine[k].shape == v.shape}
    fresh = [key.removeprefix("params/") for key in mine if key not in taken]
    if not taken:
        raise InputError(f"init.workdir {workdir}: none of its parameters fits this network")
    say(f"{len(taken)} of {len(mine)} arrays from {workdir}; new: {', '.join(fresh) or 'none'}")
    return filled(variables, taken)


def load_variables(
    workdir: Path, overrides: Sequence[tuple[str, str]] = ()
) -> tuple[ConfigDict, Mesh, Any, int, str]:
    """(config, mesh, variables to evaluate, step, fingerprint) of a run's newest good checkpoint.

    The mesh is of the devices here, whatever the run was trained on; what was shared over fsdp, to
    fit, is shared again, as far as fsdp divides them. overrides: of its config.
    """
    config = load_config(workdir)
    configs.override(config, overrides)
    configs.check(config)
    if not models.learns(config):
        raise InputError(
            f"{workdir} is a run of {config.model.name}, which has no parameters: `eval` scores it "
            "and `predict` segments images"
        )
    if not checkpoint.exists(workdir):
        raise InputError(f"no checkpoint in {workdir / 'checkpoints'} yet: train the run first")
    axes = configs.default().mesh
    axes.fsdp = math.gcd(config.mesh.fsdp, jax.device_count())
    mesh = sharding.make_mesh(axes)
    target, _, _ = build(config, mesh)
    with checkpoint.manager(workdir) as manager:
        state, step, digest = checkpoint.restore(manager, target)
    return config, mesh, state.variables(), step, digest
