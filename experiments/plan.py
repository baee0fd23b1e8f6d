"""Does a run fit a TPU slice, and what will it cost: compiles every phase ahead of time, on a machine without a TPU.

    python experiments/plan.py --gin_file=configs/plan/llama3_8b_ppo.gin --topology=v5p:2x2x4

The gin file is that of a train_ppo, train_grpo, train_sft, train_reward or train_dpo run (--stage says which of the last
three), or one with the models' sizes alone, as in configs/plan. --topology: CHIP:AxB or CHIP:AxBxC, *2 appended for two
slices; or local, the devices of this machine, without a verdict. --json=FILE, --html=FILE, --markdown=FILE: the plan there
as well. --search=N: compile the N most promising of many mesh shapes, microbatches and rows. --show_sharding: the rules of
every strategy, and how every parameter lies, without compiling; alone, of the file and the slice above. Exit code 3: it does
not fit; the message names the nearest change that would.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gin
import jax
from absl import flags

from rlhf_jax import data, learn, plan
from rlhf_jax.algorithms import programs
from rlhf_jax.algorithms.cast import assemble, assemble_grpo, load_cast, plan_judge, plan_model
from rlhf_jax.algorithms.models import with_adapters
from rlhf_jax.config import bound_config
from rlhf_jax.data.batch_config import BatchConfig
from rlhf_jax.data.record_sets import Records
from rlhf_jax.errors import InputError, RunStopped
from rlhf_jax.io.source import ModelSource
from rlhf_jax.launch import launch
from rlhf_jax.loop import LoopConfig
from rlhf_jax.models import LoraConfig
from rlhf_jax.parallel import MeshConfig, born_abstract, make_mesh, remake_mesh
from rlhf_jax.rewards import Reward
from rlhf_jax.rollout import ALL_AT_ONCE, SamplingConfig, SlotConfig

flags.DEFINE_string("topology", None, "The slice, for instance v5p:2x2x4; or local.")
flags.DEFINE_enum("stage", None, ["sft", "reward", "dpo"], "What a file with run.model trains.")
flags.DEFINE_string("json", None, "Write the whole plan there.")
flags.DEFINE_string("html", None, "Write the tables there, as a page.")
flags.DEFINE_string("markdown", None, "Write the tables there, for docs.")
flags.DEFINE_integer("search", 0, "How many variations to compile.")
flags.DEFINE_integer("repairs", 4, "How many changes to compile when a phase does not fit.")
flags.DEFINE_string("keep", None, "A directory where compiled programs are kept and looked up.")
flags.DEFINE_bool("show_sharding", False, "Print the rules and where every parameter lies; compile nothing.")


@gin.configurable
def run(
    batch: BatchConfig,
    steps: int = 1,
    mesh: MeshConfig = MeshConfig(),
    rollout_mesh: MeshConfig | None = None,
    slots: SlotConfig = ALL_AT_ONCE,
    model: ModelSource | None = None,
    optimizer: learn.OptimizerConfig | None = None,
    centring: float = 0.0,
    dpo: learn.DPOConfig = learn.DPOConfig(),
    policy: ModelSource | None = None,
    reward: ModelSource | None = None,
    share_trunk: bool = False,
    sampling: SamplingConfig | None = None,
    ppo: learn.PPOConfig | None = None,
    policy_optimizer: learn.OptimizerConfig | None = None,
    value_optimizer: learn.OptimizerConfig | None = None,
    grpo: learn.GRPOConfig | None = None,
    samples: int = 1,
    prompts: Records | None = None,
    run_dir: str | None = None,
    seed: int = 0,
    records: Records | None = None,
    loop: LoopConfig | None = None,
    reward_texts: Reward | None = None,
    reward_key: str = "",
    monitor: Reward | None = None,
    lora: LoraConfig | None = None,
    offload_optimizer: bool = False,
    one_step_off: bool = False,
) -> None:
    """As in the training programs; what stands between ``prompts`` and ``lora`` has no effect on the programs and is accepted so
    that the file of a run can be planned as it is."""
    bound_config()
    del run_dir, seed, records, loop, reward_texts, reward_key, monitor
    where = _slice()
    if where is not None:
        # Programs for a slice that is not there can be written to JAX's cache, but not read: --keep is theirs.
        jax.config.update("jax_enable_compilation_cache", False)
    chip, devices = (None, jax.devices()) if where is None else (where.chip, where.devices())

    # 1. How a candidate becomes phases, as shapes. The configured one is the first.
    shared = {"steps": steps, "sampling": sampling, "slots": slots, "rollout_mesh": rollout_mesh}
    template = data.Template(style="raw") if prompts is None else prompts.template
    common = {
        "lora": lora,
        "template": template,
        "length": batch.length,
        "devices": devices,
        "offload": offload_optimizer,
        "ahead": one_step_off,
    }
    settings: programs.PPOSettings | programs.GRPOSettings
    if policy is not None and sampling and ppo and policy_optimizer and value_optimizer:
        adams = {"policy_optimizer": policy_optimizer, "value_optimizer": value_optimizer}
        settings = programs.PPOSettings(**shared, **adams, ppo=ppo, share_trunk=share_trunk)
        build = _rollout_build(settings, policy, reward, **common)
    elif policy is not None and sampling and grpo and optimizer:
        settings = programs.GRPOSettings(**shared, samples=samples, grpo=grpo, optimizer=optimizer)
        build = _rollout_build(settings, policy, reward, **common)
    elif model is not None and optimizer is not None:
        build = _supervised_build(model, (optimizer, steps), centring, dpo, lora, batch.length, devices)
    else:
        raise InputError(
            "run: give policy, sampling, ppo, policy_optimizer and value_optimizer (PPO), policy, sampling, grpo and "
            "optimizer (GRPO), or model and optimizer (SFT, reward, DPO)"
        )
    source = policy or model
    assert source is not None
    keys = _keys("ModelConfig" if source.config is not None else "ModelSource")
    start = plan.Candidate(mesh, batch.batch_size, batch.microbatches, slots=slots.slots, keys=keys)
    grid, phases = build(start)
    planned_model = plan_model(source, "lm", grid).model
    config = planned_model.config
    algorithm = ppo or grpo
    minibatches = algorithm.minibatches if algorithm else 1
    if flags.FLAGS.show_sharding:
        meshes = {"as configured": grid}
        if rollout_mesh is not None:
            meshes["as configured for sampling"] = remake_mesh(rollout_mesh, grid)
        meshes |= plan.strategies(grid.size, config)
        print(plan.as_text(plan.sharding_tables(phases[-1], planned_model, meshes)))
        return

    # 2. Compiled one by one.
    if flags.FLAGS.search and chip is None:
        raise InputError("--search: needs a slice; local devices have no roofline")
    reports, found_at = _compile(phases, grid, chip), start
    tried: list[plan.Tried] = []
    if flags.FLAGS.search and chip is not None:
        kinds = {"remat": config.remat, "sampling": algorithm is not None}
        others = plan.variations(start, grid.size, config.num_kv_heads, minibatches, **kinds)
        found_at, grid, reports, tried = _search(build, [start, *others], chip, reports)

    # 3. What came out.
    wrong = [report for report in reports if not report.fits] if chip is not None else []
    change = ""
    if wrong and chip is not None:
        change = plan.repair(build, start, wrong, chip, config.remat, minibatches, flags.FLAGS.repairs)
    found = plan.tables(reports, where, tried)
    print(plan.as_text(found))
    asked = [*(flags.FLAGS.gin_file or ["plan"])[-1:], *(flags.FLAGS.gin_bindings or [])]
    title = f"{', '.join(asked)} on {flags.FLAGS.topology}"
    verdict = plan.summary(reports) + (f" Nearest change: {change}" if change else "")
    planned = {name: value for name, value in dataclasses.asdict(found_at).items() if name != "keys"}
    planned["mesh"] = dict(grid.shape)
    _write(flags.FLAGS.json, plan.as_json(reports, where, planned, tried, change))
    _write(flags.FLAGS.html, plan.as_html(found, title, reports, where, verdict, not wrong))
    _write(flags.FLAGS.markdown, plan.as_markdown(found, title))
    if wrong:
        raise RunStopped(f"{title}: {verdict}")


def _keys(remat: str) -> plan.Keys:
    """What the file calls the configs that a search may change."""
    names, unbound = {}, []
    for ours, config in (("mesh", "MeshConfig"), ("batch", "BatchConfig"), ("slots", "SlotConfig")):
        try:
            names[ours] = gin.query_parameter(f"run.{ours}").scoped_selector
        except (ValueError, AttributeError):  # not bound, or to no configurable
            names[ours] = config
            unbound.append((ours, f"run.{ours} = @{config}()"))
    return plan.Keys(**names, remat=remat, unbound=tuple(unbound))


def _keep() -> Path | None:
    return None if flags.FLAGS.keep is None else Path(flags.FLAGS.keep)


def _slice() -> plan.Slice | None:
    name = flags.FLAGS.topology
    if name is None:
        raise InputError("--topology: name the slice, for instance --topology=v5p:2x2x4, or --topology=local")
    return None if name == "local" else plan.parse_slice(name)


def _rollout_build(
    settings: programs.PPOSettings | programs.GRPOSettings,
    policy: ModelSource,
    reward: ModelSource | None,
    *,
    lora: LoraConfig | None,
    template: data.Template,
    length: int,
    devices: list[jax.Device],
    offload: bool,
    ahead: bool,
) -> plan.Build:
    """Of PPO and GRPO, assembled as train_ppo and train_grpo do it. length: of prompts."""

    def build(candidate: plan.Candidate) -> tuple[jax.sharding.Mesh, list[plan.Phase]]:
        grid, rng = make_mesh(candidate.mesh, devices), jax.random.key(0, impl="threefry2x32")
        decoding = dataclasses.replace(settings.slots, slots=candidate.slots)
        chosen = dataclasses.replace(settings, microbatches=candidate.microbatches, slots=decoding)
        sources = [_with_remat(each, candidate.remat) for each in (policy, reward)]
        shapes = {"lora": lora, "load": plan_model, "load_judge": plan_judge}
        if isinstance(chosen, programs.PPOSettings):
            cast = load_cast(*sources, chosen.share_trunk, grid, rng, **shapes)
            state, functions = assemble(cast, chosen, template, grid, rng, born=born_abstract)
        else:
            if candidate.rows % chosen.samples:
                raise InputError(f"BatchConfig.batch_size = {candidate.rows}: not a multiple of run.samples")
            needed = {"critic": False, "reference": chosen.grpo.kl_coefficient > 0}
            cast = load_cast(*sources, False, grid, rng, **needed, **shapes)
            state, functions = assemble_grpo(cast, chosen, template, grid, rng, born=born_abstract)
        cast.refuse_longer(length + chosen.sampling.max_new_tokens, "BatchConfig.length + max_new_tokens")
        sizes = {"rows": candidate.rows, "prompt_length": length, "offload": offload, "ahead": ahead}
        return grid, plan.rollout_phases(cast.models, cast.frozen, state, functions, chosen, grid, **sizes)

    return build


def _supervised_build(
    source: ModelSource,
    optimizer: tuple[learn.OptimizerConfig, int],
    centring: float,
    dpo: learn.DPOConfig,
    lora: LoraConfig | None,
    length: int,
    devices: list[jax.Device],
) -> plan.Build:
    """Of SFT, reward model and DPO, as --stage says."""
    stage = flags.FLAGS.stage
    if stage is None:
        raise InputError("--stage: say what the file trains: --stage=sft, --stage=reward or --stage=dpo")
    for key, trains in {"run.dpo": "dpo", "run.centring": "reward"}.items():
        if stage != trains and _is_bound(key):
            raise InputError(f"--stage={stage}: the file binds {key}, which --stage={trains} reads; remove one")

    def build(candidate: plan.Candidate) -> tuple[jax.sharding.Mesh, list[plan.Phase]]:
        grid, rng = make_mesh(candidate.mesh, devices), jax.random.key(0)
        chosen = _with_remat(source, candidate.remat)
        loaded = with_adapters(plan_model(chosen, "scalar" if stage == "reward" else "lm", grid), lora, grid, rng)
        loaded.refuse_longer(length, "BatchConfig.length")
        sizes = {"rows": candidate.rows, "length": length, "microbatches": candidate.microbatches}
        own: dict[str, Any] = {"frozen": loaded.frozen}
        if stage == "reward":
            own["centring"] = centring
        elif stage == "dpo":
            reference = plan_model(chosen, "lm", grid) if lora is None else loaded.base("lm")
            own |= {"dpo": dpo, "reference": reference.model}
            own["frozen"] = loaded.frozen | {"reference": reference.params}
        adam = learn.make_optimizer(*optimizer, matrices=loaded.model.matrices())
        return grid, plan.supervised_phases(loaded.model, loaded.params, adam, grid, **sizes, **own)

    return build


def _is_bound(key: str) -> bool:
    try:
        gin.query_parameter(key)
    except ValueError:
        return False
    return True


def _with_remat(source: ModelSource | None, remat: plan.Remat | None) -> ModelSource | None:
    if source is None or remat is None:
        return source
    if source.config is not None:
        return dataclasses.replace(source, config=source.config.replace(remat=remat))
    return dataclasses.replace(source, remat=remat)


def _compile(phases: list[plan.Phase], grid: jax.sharding.Mesh, chip: plan.Chip | None) -> list[plan.Report]:
    reports = []
    for phase in phases:
        print(f"compiling {phase.name} ...", end="", file=sys.stderr, flush=True)
        reports.append(plan.compile_phase(phase, grid, chip, _keep()))
        print(f" {reports[-1].compile_seconds:.0f} s", file=sys.stderr, flush=True)
    return reports


def _search(build: Any, candidates: list[plan.Candidate], chip: plan.Chip, first: list[plan.Report]) -> Any:
    """(candidate, mesh, reports, everything tried) of the best that fits (the first when none does), each told on stderr."""
    start, *others = candidates
    best = (start, build(start)[0], first)
    tried = [plan.Tried(start.bindings(start), first)]
    for candidate in plan.promising(build, others, chip, flags.FLAGS.search):
        changed = candidate.bindings(start)
        print(f"trying {changed}", file=sys.stderr)
        grid, phases = build(candidate)
        reports = _compile(phases, grid, chip)
        tried.append(plan.Tried(changed, reports))
        print(f"  {plan.verdict(reports)}", file=sys.stderr)
        if plan.better(reports, best[2]):
            best = (candidate, grid, reports)
    print(f"best: {best[0].bindings(start)}", file=sys.stderr)
    return *best, tried


def _write(path: str | None, text: str) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)


def _whole(arguments: list[str]) -> list[str]:
    """--show_sharding alone is of the docstring's example, and says so."""
    names = {argument.lstrip("-").partition("=")[0] for argument in arguments[1:]}
    if "show_sharding" not in names or names & {"gin_file", "gin_bindings", "topology"}:
        return arguments
    example = ["--gin_file=configs/plan/llama3_8b_ppo.gin", "--topology=v5p:2x2x4"]
    print(f"of {' '.join(example)}", file=sys.stderr)
    return [*arguments, *example]


if __name__ == "__main__":
    sys.argv = _whole(sys.argv)
    launch(run)
