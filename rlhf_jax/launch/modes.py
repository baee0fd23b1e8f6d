"""Modes of a training script besides training: --plan compiles its phases for a TPU slice, --doctor checks its configuration.

The flags of both are defined in this module.
"""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any, Protocol

from absl import flags

from rlhf_jax.config import bound_reference
from rlhf_jax.errors import InputError
from rlhf_jax.loop import LoopConfig
from rlhf_jax.parallel import MeshConfig

flags.DEFINE_string(
    "plan", None, "Compile the phases for a slice (v5p:2x2x4, or local) and say whether they fit; train nothing."
)
flags.DEFINE_string("plan_json", None, "With --plan: write the whole plan there.")
flags.DEFINE_string("plan_html", None, "With --plan: write the tables there, as a page.")
flags.DEFINE_string("plan_markdown", None, "With --plan: write the tables there, for docs.")
flags.DEFINE_integer("plan_search", 0, "With --plan: how many variations to compile.")
flags.DEFINE_integer("plan_repairs", 4, "With --plan: how many changes to compile when a phase does not fit.")
flags.DEFINE_string("plan_keep", None, "With --plan: a directory where compiled programs are kept and looked up.")
flags.DEFINE_bool(
    "show_sharding", False, "With --plan: print the rules and where every parameter lies; compile nothing."
)
flags.DEFINE_bool(
    "doctor", False, "Check the configuration, the data and one step; train nothing, write nothing to run_dir."
)
PLAN_FLAGS = (
    "plan_json",
    "plan_html",
    "plan_markdown",
    "plan_search",
    "plan_repairs",
    "plan_keep",
    "show_sharding",
)
flags.DEFINE_integer(
    "preview", 0, "Show that many examples as the model sees them, targets in colour; train nothing.", lower_bound=0
)
MODE_FLAGS = ("plan", *PLAN_FLAGS, "doctor", "preview")


class Described(Protocol):
    """A description of an algorithm (`rlhf_jax.algorithms.Algorithm`); only its fields that a mode reads are listed.

    run_only: fields that a run needs and a plan does not.
    phase_names: the phases of a step that a deadline or a fault may name.
    """

    @property
    def name(self) -> str: ...
    @property
    def run_only(self) -> tuple[str, ...]: ...
    @property
    def phase_names(self) -> tuple[str, ...]: ...
    def assemble(self, setting: Any) -> Any: ...
    def phases(self, job: Any) -> list[Any]: ...


@dataclasses.dataclass(frozen=True)
class RunSettings:
    """The settings that a run needs and a plan may omit."""

    run_dir: str
    steps: int
    seed: int
    loop: LoopConfig


def run_mode(
    algorithm: Described,
    *,
    mesh: MeshConfig,
    steps: int | None,
    seed: int | None,
    run_dir: str | None,
    loop: LoopConfig | None,
) -> RunSettings | None:
    """Run --plan, --doctor or --preview and return None; without them, return the settings of a run, all of which have a value.

    A plan needs neither data nor run_dir, steps, seed and loop; doctor and preview need the data. Raises InputError naming the
    first
    parameter that a run needs and that has no value.
    """
    if sum((flags.FLAGS.plan is not None, flags.FLAGS.doctor, flags.FLAGS.preview > 0)) > 1:
        raise InputError("--plan, --doctor, --preview: give one of them")
    if flags.FLAGS.plan is None and (unused_flag := _first_set_flag(PLAN_FLAGS)):
        raise InputError(
            f"--{unused_flag}: has no effect without --plan; add --plan=SLICE or --plan=local, or remove it"
        )
    if flags.FLAGS.plan is not None:
        from rlhf_jax.plan import plan_run

        plan_run(algorithm, mesh, 1 if steps is None else steps, _options())
        return None
    data = {name: getattr(algorithm, name) for name in algorithm.run_only}
    needed = {"run_dir": run_dir, "steps": steps, "seed": seed, "loop": loop}
    checking = flags.FLAGS.doctor or flags.FLAGS.preview > 0
    _check_bound(data if checking else {**needed, **data})
    if loop is not None:
        loop.check_phases(algorithm.phase_names)
    if not checking:
        assert run_dir is not None and steps is not None and seed is not None and loop is not None
        return RunSettings(run_dir, steps, seed, loop)
    from rlhf_jax.doctor import examine, preview

    with tempfile.TemporaryDirectory() as scratch:
        settings = RunSettings(
            run_dir=f"{scratch}/run" if run_dir is None else run_dir,
            steps=1 if steps is None else steps,
            seed=0 if seed is None else seed,
            loop=LoopConfig() if loop is None else loop,
        )
        if flags.FLAGS.doctor:
            examine(algorithm, mesh=mesh, **vars(settings))
        else:
            preview(algorithm, mesh=mesh, seed=settings.seed, run_dir=settings.run_dir, examples=flags.FLAGS.preview)
    return None


def _first_set_flag(names: tuple[str, ...]) -> str | None:
    """Return the first of the flags that is not at its default; None when all are."""
    return next((name for name in names if flags.FLAGS[name].value != flags.FLAGS[name].default), None)


def _check_bound(values: dict[str, Any]) -> None:
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise InputError(f"run.{missing[0]}: has no value; bind it in the gin file or with --gin_bindings")


def _options() -> Any:
    from rlhf_jax.plan import Keys, PlanOptions

    names: dict[str, str] = {}
    unbound: list[tuple[str, str]] = []
    for part, config in (("mesh", "MeshConfig"), ("batch", "BatchConfig"), ("slots", "SlotConfig")):
        reference = bound_reference(f"run.{part}")
        names[part] = reference or config
        if reference is None:
            unbound.append((part, f"run.{part} = @{config}()"))
    values = flags.FLAGS
    return PlanOptions(
        slice=values.plan,
        json=values.plan_json,
        html=values.plan_html,
        markdown=values.plan_markdown,
        search=values.plan_search,
        repairs=values.plan_repairs,
        keep=values.plan_keep,
        show_sharding=values.show_sharding,
        inputs=[*(values.gin_file or ["plan"])[-1:], *(values.gin_bindings or [])],
        keys=Keys(**names, unbound=tuple(unbound)),
    )
