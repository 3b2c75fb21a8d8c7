"""The configuration tree: what is read, what wins, what is refused and with which words; and the packaged presets."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hmar_mega.config import Config
from hmar_mega.config_io import ConfigError, config_to_yaml, known_keys, load_config, packaged_configs, parse_config
from hmar_mega.errors import UserError
from hmar_mega.scales import PATCH_NUMS


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def message(overrides: list[str]) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(None, overrides)
    return str(error.value)


# What is read


def test_defaults_are_a_legal_configuration() -> None:
    assert load_config() == Config()


def test_depth_sets_width_heads_and_drop_path() -> None:
    """SPEC: C = 64·d, H = d, D = 64, feed-forward 4C, drop-path 0.1·d/24."""
    model = load_config(None, ["model.depth=20"]).model
    assert (model.resolved_width, model.resolved_heads, model.head_dim, model.ffn_width) == (1280, 20, 64, 5120)
    assert model.resolved_drop_path == pytest.approx(0.1 * 20 / 24)


@pytest.mark.parametrize(("depth", "layers"), [(1, 1), (2, 1), (8, 4), (12, 6), (16, 8), (30, 8)])
def test_mask_branch_is_eight_layers_or_half_the_depth_below_16(depth: int, layers: int) -> None:
    assert load_config(None, [f"model.depth={depth}"]).model.resolved_mask_layers == layers


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "optim: {base_lr: 3.0e-4, epochs: 7}\n")
    config = load_config(path, ["optim.base_lr=5e-5"])
    assert config.optim.base_lr == 5e-5
    assert config.optim.epochs == 7


def test_the_last_override_wins() -> None:
    assert load_config(None, ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("optim.base_lr=1e-4", "optim", "base_lr", 1e-4),
        ("schedule.patch_nums=[1,2,3,4,5,6,8,10,13,16]", "schedule", "patch_nums", PATCH_NUMS[256]),
        ("optim.weight_decay_end=null", "optim", "weight_decay_end", None),
        ("optim.weight_decay_end=", "optim", "weight_decay_end", None),
        ("logging.tensorboard=false", "logging", "tensorboard", False),
        ("logging.wandb='off'", "logging", "wandb", "off"),
        ("run.dir=runs/a=b", "run", "dir", "runs/a=b"),
        (" run.seed =3", "run", "seed", 3),
    ],
)
def test_override_values_are_yaml(override: str, section: str, key: str, value: object) -> None:
    assert getattr(getattr(load_config(None, [override]), section), key) == value


def test_override_reaches_nested_sections() -> None:
    assert load_config(None, ["model.attention.pattern=block_causal"]).model.attention.pattern == "block_causal"


def test_numbers_in_the_file_may_be_written_as_people_write_them(tmp_path: Path) -> None:
    """YAML 1.1 takes `1e-4`, without a point, for a string."""
    assert load_config(write(tmp_path / "run.yaml", "optim: {base_lr: 1e-4}\n")).optim.base_lr == 1e-4


# Includes


def test_later_includes_win_and_the_file_itself_wins_over_all(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "optim: {epochs: 1, base_lr: 0.1, clip: 1.0}\n")
    write(tmp_path / "b.yaml", "optim: {epochs: 2, base_lr: 0.2}\n")
    both = write(tmp_path / "run.yaml", "include: [a.yaml, b.yaml]\noptim: {epochs: 3}\n")
    optim = load_config(both).optim
    assert (optim.epochs, optim.base_lr, optim.clip) == (3, 0.2, 1.0)
    turned = write(tmp_path / "turned.yaml", "include: [b.yaml, a.yaml]\n")
    assert load_config(turned).optim.epochs == 1


def test_include_may_be_one_name_and_may_name_a_packaged_config(tmp_path: Path) -> None:
    path = write(tmp_path / "run.yaml", "include: model/d24\nmodel: {depth: 20}\n")
    model = load_config(path).model
    assert (model.depth, model.gamma_init) == (20, 1e-4)


def test_includes_nest_and_are_relative_to_their_file(tmp_path: Path) -> None:
    write(tmp_path / "parts" / "base.yaml", "run: {seed: 11}\n")
    write(tmp_path / "parts" / "more.yaml", "include: [base.yaml]\noptim: {epochs: 4}\n")
    config = load_config(write(tmp_path / "run.yaml", "include: [parts/more.yaml]\n"))
    assert (config.run.seed, config.optim.epochs) == (11, 4)


def test_the_same_file_may_be_included_twice_but_not_by_itself(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "run: {seed: 5}\n")
    write(tmp_path / "a.yaml", "include: [base.yaml]\n")
    write(tmp_path / "b.yaml", "include: [base.yaml]\n")
    assert load_config(write(tmp_path / "run.yaml", "include: [a.yaml, b.yaml]\n")).run.seed == 5
    write(tmp_path / "x.yaml", "include: [y.yaml]\n")
    with pytest.raises(ConfigError, match=r"includes itself through x\.yaml → y\.yaml"):
        load_config(write(tmp_path / "y.yaml", "include: [x.yaml]\n").parent / "x.yaml")


# What is refused


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("optim.base_rl=1", "optim.base_lr"),
        ("model.dept=8", "model.depth"),
        ("optmi.base_lr=1", "optim"),
        ("model.attention.patern=block_causal", "model.attention.pattern"),
        ("schedule.global_batch_size=8", "data.global_batch_size"),
        ("tensor_parallel=2", "parallel.tensor_parallel"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(override: str, nearest: str) -> None:
    key = override.split("=")[0]
    text = message([override])
    assert text.startswith(f"unknown key {key if key != 'optmi.base_lr' else 'optmi'}; did you mean ")
    assert text.endswith(f"{nearest}?")
    assert nearest in set(known_keys())


def test_an_unknown_key_like_nothing_known_says_where_to_look() -> None:
    text = message(["zzzzzzzz=1"])
    assert text.startswith("unknown key zzzzzzzz")
    assert "known keys" in text


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.depth=sixteen", ["model.depth='sixteen'", "valid integer"]),
        ("model.depth=2.5", ["model.depth=2.5", "integer"]),
        ("model.depth=0", ["model.depth=0", "greater than or equal to 1"]),
        ("optim.base_lr=-1", ["optim.base_lr=-1", "greater than 0"]),
        ("optim.base_lr=.inf", ["optim.base_lr=inf", "finite"]),
        ("optim.betas=[0.9]", ["optim.betas.1"]),
        ("logging.tensorboard=perhaps", ["logging.tensorboard='perhaps'", "valid boolean"]),
        ("precision.compute=fp64", ["precision.compute='fp64'", "'fp32'", "'bf16'"]),
        ("stage.name=third", ["stage.name='third'", "'next_scale'", "'masked'"]),
        ("model.attention.pattern=dense", ["'block_diagonal' or 'block_causal'"]),
        ("optim=3", ["optim=3"]),
        ("run.seed=-1", ["run.seed=-1", "greater than or equal to 0"]),
    ],
)
def test_a_wrong_value_says_key_value_and_what_is_allowed(override: str, words: list[str]) -> None:
    text = message([override])
    assert [w for w in words if w not in text] == []
    assert "pydantic" not in text


def test_all_mistakes_are_told_at_once() -> None:
    text = message(["model.dept=8", "optim.clip=0"])
    assert len(text.splitlines()) == 2


def test_config_errors_are_user_errors() -> None:
    assert issubclass(ConfigError, UserError)


def test_tensor_parallel_that_does_not_divide_the_heads_lists_what_does() -> None:
    expected = "tensor_parallel=4 does not divide the 30 heads of depth 30; use 1, 2, 3, 5, 6, 10, 15 or 30"
    assert message(["model.depth=30", "parallel.tensor_parallel=4"]) == expected
    assert load_config(None, ["model.depth=30", "parallel.tensor_parallel=5"]).parallel.tensor_parallel == 5


def test_patch_nums_that_do_not_fit_the_resolution_say_what_would() -> None:
    text = message(["schedule.resolution=128", "schedule.patch_nums=[1,2,4]"])
    assert "makes 64 px images, not resolution=128" in text
    assert "end patch_nums at 8 or set resolution=64" in text


def test_an_unpublished_resolution_asks_for_patch_nums() -> None:
    text = message(["schedule.resolution=64"])
    assert "resolution=64 has no published patch_nums" in text
    assert "give schedule.patch_nums" in text
    fits = ["schedule.resolution=64", "schedule.patch_nums=[1,2,4]"]
    assert load_config(None, fits).schedule.scales.num_tokens == 21


FP8_ATTENTION = ["precision.fp8=linears_and_attention", "model.heads=8"]  # head_dim 128


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["schedule.patch_nums=[1,3,2]"], "increase strictly"),
        (["schedule.mask_schedule=[[1],[1,4]]"], "entry [1, 4] of scale 2"),
        (["model.heads=7"], "heads=7 does not divide width=1024"),
        (["model.depth=4", "model.mask_layers=5"], "mask_layers=5 is more than depth=4; use 1 to 4"),
        (["tokenizer.channel_mult=[1,2]"], "downsample 4, 8 or 16"),
        (["tokenizer.base_channels=48"], "which norm_groups=32 does not divide"),
        (["parallel.pipeline_parallel=2", "parallel.zero_stage=3"], "use zero_stage=1"),
        (["parallel.virtual_pipeline_parallel=2"], "set pipeline_parallel ≥ 2"),
        (["parallel.pipeline_parallel=17"], "use at most pipeline_parallel=16"),
        (["parallel.zero_stage=0"], "use zero_stage=1, 2 or 3"),
        (["parallel.sequence_parallel=true"], "set tensor_parallel ≥ 2"),
        (["parallel.context_parallel=2"], "For 1024 px use context_parallel=1 with tensor_parallel ≥ 2"),
        (["precision.fp8=linears", "precision.compute=fp32"], "set precision.compute=bf16, or precision.fp8=none"),
        (["precision.fp8=linears", "model.width=56", "model.heads=7"], "multiple of 16 on each of the 1 tensor"),
        (["precision.fp8=linears_and_attention"], "set precision.fp8_pad_head_dim=true (zero-padded"),
        (["precision.fp8=linears_and_attention", "model.heads=4"], "this model has 256; set model.heads to width/128"),
        (
            [*FP8_ATTENTION, "model.attention.pattern=block_causal"],
            "not block_causal; set model.attention.backend=",
        ),
        ([*FP8_ATTENTION, "model.attention.backend=sdpa"], "is attention.backend=te or triton, not sdpa"),
        (["model.attention.backend=te", "model.attention.pattern=block_causal"], "use another backend, such as sdpa"),
    ],
)
def test_combinations_that_cannot_work_are_refused(overrides: list[str], words: str) -> None:
    assert words in message(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        FP8_ATTENTION,
        ["precision.fp8=linears_and_attention", "precision.fp8_pad_head_dim=true", "model.attention.backend=te"],
        ["precision.fp8=linears", "parallel.tensor_parallel=4", "model.attention.pattern=block_causal"],
        [
            "precision.fp8=linears_and_attention",
            "model.attention.backend=triton",
            "model.attention.pattern=block_causal",
        ],
    ],
)
def test_what_fp8_can_compute_is_accepted(overrides: list[str]) -> None:
    assert load_config(None, overrides).precision.fp8_recipe == "delayed"


@pytest.mark.parametrize("text", ["optim.base_lr", "=3", "", "  =3"])
def test_an_override_without_key_or_value_shows_the_form(text: str) -> None:
    assert "section.key=value" in message([text])


def test_an_override_through_a_value_is_refused() -> None:
    assert "base_lr is a value, not a section" in message(["optim.base_lr=1", "optim.base_lr.x=2"])


def test_an_override_that_is_not_yaml_is_a_user_error() -> None:
    assert "schedule.patch_nums" in message(["schedule.patch_nums=[1, 2"])


def test_a_missing_config_names_the_nearest_packaged_ones() -> None:
    with pytest.raises(ConfigError, match=r"no config 'train/d16-265': .*nearest: .*train/d16-256"):
        load_config("train/d16-265")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [depth", "cannot read"),
        ("- 1\n- 2\n", "must be a mapping of sections, not list"),
        ("model:\n  dept: 8\n", "unknown key model.dept; did you mean model.depth?"),
        ("include: [nowhere]\n", "no config 'nowhere'"),
        ("include: 3\n", "include"),
        ("include: [3]\n", "include"),
    ],
)
def test_a_broken_file_is_a_user_error(tmp_path: Path, text: str, words: str) -> None:
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert words in str(error.value)


def test_a_file_that_is_not_text_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(path)


def test_an_empty_file_and_an_empty_section_are_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path / "empty.yaml", "")) == Config()
    assert load_config(write(tmp_path / "comments.yaml", "# nothing yet\n")) == Config()
    section = write(tmp_path / "section.yaml", "optim:\n  # nothing yet\n")
    assert load_config(section) == Config()
    assert load_config(section, ["optim.epochs=3"]).optim.epochs == 3


# Printing

fractions = st.floats(1e-9, 1, exclude_max=True)


@given(
    depth=st.integers(1, 40),
    lr=fractions,
    eps=fractions,
    end=st.none() | fractions,
    directory=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12),
    wandb=st.sampled_from(["off", "offline", "online"]),
)
def test_the_printed_configuration_reads_back_the_same(
    depth: int, lr: float, eps: float, end: float | None, directory: str | None, wandb: str
) -> None:
    """`--print-config`, and the copy in every run directory, must be the run and nothing else."""
    config = parse_config(
        {
            "model": {"depth": depth},
            "optim": {"base_lr": lr, "eps": eps, "weight_decay_end": end},
            "run": {"dir": directory},
            "logging": {"wandb": wandb},
            "schedule": {"resolution": 64, "patch_nums": [1, 2, 4], "mask_schedule": [[1], [1, 3]]},
        }
    )
    assert parse_config(yaml.safe_load(config_to_yaml(config))) == config


def test_printing_writes_out_every_key() -> None:
    ramp = "data.batch_ramp={start: 256, increment: 256, images: 1000}"  # the one section that is left out by default
    tree = yaml.safe_load(config_to_yaml(load_config(None, [ramp])))

    def leaves(node: dict[str, object], prefix: str = "") -> set[str]:
        found = set()
        for key, value in node.items():
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
        return found

    sections = {k.rsplit(".", 1)[0] for k in known_keys() if "." in k}
    assert leaves(tree) == set(known_keys()) - sections


# Packaged configurations

#: SPEC §4: depth → global batch, epochs, base lr, γ_init, final ratio, weight decay, its end; shared AdaLN.
PRESETS = {
    "d16": (16, 768, 200, 1e-4, 1e-3, 0.1, 0.05, None, False),
    "d20": (20, 768, 250, 1e-4, 1e-3, 0.1, 0.05, None, False),
    "d24": (24, 768, 350, 8e-5, 1e-4, 0.01, 0.05, None, False),
    "d30": (30, 1024, 350, 8e-5, 1e-5, 0.01, 0.05, 0.08, False),
    "d36-s": (36, 768, 350, 8e-5, 5e-6, 0.01, 0.05, 0.08, True),
    "10b": (48, 2048, 350, 8e-5, 5e-6, 0.01, 0.05, 0.08, True),  # a projection for planning, published by no one
}
PRESETS |= {"d8": (8, *PRESETS["d16"][1:]), "d12": (12, *PRESETS["d16"][1:])}

#: SPEC §6: guidance, top-k and top-p with which HMAR is evaluated.
EVALUATION = {"d16": (1.7, 1000), "d20": (1.9, 950), "d24": (2.1, 900), "d30": (1.6, 650)}

#: packaged training configuration → model preset, resolution, sampling passes.
TRAINING = {
    "train/d8-256": ("d8", 256, 14),
    "train/d12-256": ("d12", 256, 14),
    "train/d16-256": ("d16", 256, 14),
    "train/d20-256": ("d20", 256, 14),
    "train/d24-256": ("d24", 256, 14),
    "train/d30-256": ("d30", 256, 14),
    "train/d24-512": ("d24", 512, 15),
    "train/d36-s-512": ("d36-s", 512, 15),
    "train/10b-512": ("10b", 512, 15),
    "train/d24-1024": ("d24", 1024, 20),
    "train/var-d16-256": ("d16", 256, 10),
}


def hyper_parameters(config: Config) -> tuple[object, ...]:
    model, optim = config.model, config.optim
    return (
        model.depth,
        config.data.global_batch_size,
        optim.epochs,
        optim.base_lr,
        model.gamma_init,
        optim.final_ratio,
        optim.weight_decay,
        optim.weight_decay_end,
        model.shared_aln,
    )


@pytest.mark.parametrize("name", packaged_configs())
def test_every_packaged_config_loads(name: str) -> None:
    config = load_config(name)
    assert parse_config(yaml.safe_load(config_to_yaml(config))) == config


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_model_presets_are_the_published_table(name: str) -> None:
    config = load_config(f"model/{name}")
    assert hyper_parameters(config) == PRESETS[name]
    assert (config.optim.betas, config.optim.clip, config.optim.warmup_start) == ((0.9, 0.95), 2.0, 0.005)


@pytest.mark.parametrize("name", sorted(EVALUATION))
def test_model_presets_sample_with_the_published_settings(name: str) -> None:
    evaluation = load_config(f"model/{name}").eval
    assert (evaluation.cfg_scale, evaluation.top_k, evaluation.top_p) == (*EVALUATION[name], 0.99)


@pytest.mark.parametrize("name", sorted(TRAINING))
def test_training_configs_combine_preset_schedule_and_stage(name: str) -> None:
    preset, resolution, passes = TRAINING[name]
    config = load_config(name)
    assert hyper_parameters(config) == PRESETS[preset]
    assert config.schedule.resolution == resolution
    assert config.schedule.scales.patch_nums == PATCH_NUMS[resolution]
    assert sum(len(entry) for entry in config.schedule.resolved_mask_schedule) == passes
    assert config.stage.name == "next_scale"
    var = name.startswith("train/var-")
    assert config.model.attention.pattern == ("block_causal" if var else "block_diagonal")
    assert config.stage.loss_weights == ("uniform" if var else "lognormal")


def test_every_training_config_is_in_the_table() -> None:
    assert {name for name in packaged_configs() if name.startswith("train/")} == set(TRAINING)


@pytest.mark.parametrize(("name", "passes"), [("256", 14), ("256-benchmark", 13), ("512", 15), ("1024", 20)])
def test_schedule_presets_take_the_published_passes(name: str, passes: int) -> None:
    schedule = load_config(f"schedule/{name}").schedule
    assert schedule.patch_nums == PATCH_NUMS[int(name.split("-")[0])]
    assert sum(len(entry) for entry in schedule.resolved_mask_schedule) == passes


def test_the_masked_stage_after_a_training_config_changes_stage_and_epochs_only(tmp_path: Path) -> None:
    """SPEC §5: 100 epochs, otherwise the hyper-parameters of stage 1."""
    path = write(tmp_path / "masked.yaml", "include: [train/d24-256, stage/masked]\n")
    first, second = load_config("train/d24-256"), load_config(path)
    assert (second.stage.name, second.stage.mask_input, second.optim.epochs) == ("masked", "leak_free", 100)
    back = {"stage": first.stage, "optim": second.optim.model_copy(update={"epochs": first.optim.epochs})}
    assert second.model_copy(update=back) == first


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=a", "data.mix=[{path: b, weight: 1}]"], r"mix and train=a both say what to train on"),
        (["data.encode=online", "data.images=a", "data.mix=[{path: b, weight: 1}]"], r"mix and images=a both say"),
        (["data.mix=[{path: b, weight: 0}]"], "weight"),
        (["data.stream_samples=5"], r"stream_samples is for reader=webdataset or energon"),
        (["data.reader=webdataset", "data.shuffle=groups"], r"reader=webdataset has no shuffle"),
        (["data.reader=energon", "data.encode=online"], r"reader=energon has no encode"),
        (["data.reader=webdataset", "data.cache=/tmp"], r"reader=webdataset has no cache"),
    ],
)
def test_ways_of_reading_that_do_not_go_together(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config(None, overrides)
