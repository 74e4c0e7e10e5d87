"""The shipped recipes: the llama ones hold the paper's hyper-parameters and fit the models that they name."""

import re
from importlib import resources

import pytest

from cream import recipes
from cream.config import Config, keys, load_recipe, to_yaml
from cream.log import UserError
from cream.plan import known_shape, plan

LLAMAS = ["llama2-7b", "llama3-8b"]
LORA = "llama2-7b-lora"

# The table of hyper-parameters as the released code (Raibows/CREAM at de1d04b) and its README have it, and the paper's
# N = 5, Kendall, C = (tau + 1) / 2 over the round. 32 is 4 a GPU on 8 GPUs.
PAPER = {
    "run.seed": 0,
    "run.iterations": 2,
    "model.dtype": "bfloat16",
    "data.prompts_per_iteration": 21_000 // 2,
    "data.sft_limit": 109 * 32,
    "sft.enabled": True,
    "sft.lr": 5e-6,
    "sft.epochs": 5,
    "sft.batch_size": 32,
    "sft.max_length": 2048,
    "sft.warmup": 0.1,
    "sft.weight_decay": 0.01,
    "sft.clip": 1.0,
    "sample.responses": 5,
    "sample.temperature": 0.8,
    "sample.top_p": 0.95,
    "sample.max_new_tokens": 768,
    "score.reward": "dpo",
    "score.length_normalize": False,
    "score.first_round": "mean_logp",
    "score.max_length": 4096,
    "consistency.method": "kendall",
    "consistency.level": "avg",
    "consistency.map": "linear",
    "train.beta": 0.1,
    "train.lr": 1e-6,
    "train.epochs": 1,
    "train.batch_size": 32,
    "train.max_length": 2048,
    "train.warmup": 0.1,
    "train.weight_decay": 0.01,
    "train.clip": 1.0,
    "evaluate.max_new_tokens": 768,
    "evaluate.suffix": "\nAnswer the question by thinking step by step. At the end, output the final answer, "
    "starting with 'Answer:'.",
}


def value(config: Config, key: str):
    section, _, name = key.partition(".")
    return getattr(getattr(config, section), name)


def test_these_are_shipped():
    assert recipes.names() == ["llama2-7b", "llama2-7b-lora", "llama3-8b", "smoke", "smollm2-135m"]


@pytest.mark.parametrize("name", recipes.names())
def test_each_loads_runs_in_its_own_directory_and_says_so_in_its_file(name):
    config = load_recipe(name)
    assert config.run.dir == f"runs/{name}"
    text = (resources.files("cream.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 120
    assert load_recipe(name) == config and load_recipe(name) is not config


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_as_yaml_is_the_same_recipe(name, tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(load_recipe(name)), encoding="utf-8")
    assert load_recipe(str(tmp_path / "config.yaml")) == load_recipe(name)


@pytest.mark.parametrize("name", [*LLAMAS, LORA])
def test_llama_recipes_state_the_papers_hyper_parameters(name):
    config = load_recipe(name)
    assert {key: value(config, key) for key in PAPER} == PAPER
    written = recipes.read(name)  # not left to defaults, which may change
    unwritten = {key for key in PAPER if key not in written}
    assert unwritten == {"sft.enabled", "evaluate.suffix"}


def test_the_defaults_are_the_papers_too():
    config = Config()
    of_the_recipe = {"model.dtype", "data.prompts_per_iteration", "data.sft_limit"}
    for key in PAPER.keys() - of_the_recipe:
        assert value(config, key) == PAPER[key], key


@pytest.mark.parametrize("name", [*LLAMAS, LORA])
def test_llama_recipes_name_the_five_tasks_and_the_sft_data(name):
    data = load_recipe(name).data
    tasks = ["ai2_arc:ARC-Easy", "ai2_arc:ARC-Challenge", "openbookqa", "social_i_qa", "gsm8k"]
    assert data.sft == ["OpenAssistant/oasst1"]
    for task in tasks:
        assert sum(task in source for source in data.prompts) == 1
        assert sum(task in source for source in data.evaluate) == 1
    assert not any("@" in source and "train" not in source for source in data.prompts)  # no test row is trained on
    assert all(re.search("@(test|validation)$", source) for source in data.evaluate)
    assert data.evaluate_limit is None


# The last three for memory: Llama 3 has a quarter of the kv heads, and more parameters.
CHANGED = {"run.dir", "model.path", "sample.batch_size", "sft.batch_tokens", "train.batch_tokens"}


def test_the_llama_recipes_differ_in_model_directory_and_memory_only():
    two, three = map(load_recipe, LLAMAS)
    assert {key for key in keys() if "." in key and value(two, key) != value(three, key)} == CHANGED
    assert (two.model.path, three.model.path) == (
        "meta-llama/Llama-2-7b-chat-hf",
        "meta-llama/Meta-Llama-3-8B-Instruct",
    )


def test_the_lora_recipe_differs_in_adapters_and_memory_only():
    """The released code's --use_lora: r 32, alpha 64, dropout 0.1."""
    full, adapted = load_recipe("llama2-7b"), load_recipe(LORA)
    memory = {"model.gradient_checkpointing", "optim.moments", "optim.sums", "sample.batch_size", "evaluate.batch_size"}
    changed = {key for key in keys() if "." in key and value(full, key) != value(adapted, key)}
    assert changed == {"run.dir", "lora.r"} | memory
    assert (adapted.lora.r, adapted.lora.alpha, adapted.lora.dropout, len(adapted.lora.targets)) == (32, 64, 0.1, 7)
    assert {"lora.r", "lora.alpha", "lora.dropout", "lora.targets"} <= recipes.read(LORA).keys()


# config.json of the two models, by hand: the repositories are gated.
SHAPES = {
    "llama2-7b": dict(
        vocab_size=32_000, intermediate_size=11_008, num_key_value_heads=32, max_position_embeddings=4096
    ),
    "llama3-8b": dict(
        vocab_size=128_256, intermediate_size=14_336, num_key_value_heads=8, max_position_embeddings=8192
    ),
}


@pytest.mark.parametrize("name, billions", [("llama2-7b", 6.738), ("llama3-8b", 8.030)])
def test_the_models_have_the_published_sizes_and_hold_the_recipes_sequences(name, billions):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    shape = transformers.LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, tie_word_embeddings=False, **SHAPES[name]
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    assert all(p.is_meta for p in model.parameters())
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == billions
    assert model.get_output_embeddings().weight.shape == (shape.vocab_size, 4096)
    config = load_recipe(name)
    for limit in (config.sft.max_length, config.train.max_length, config.score.max_length):
        assert limit <= shape.max_position_embeddings
    assert config.data.max_prompt_tokens + config.sample.max_new_tokens <= config.train.max_length


@pytest.mark.parametrize("name", recipes.names())
def test_a_kill_costs_few_steps_where_they_take_long_and_the_plan_counts_the_disk(name):
    config = load_recipe(name)
    every = {"smoke": 0, "smollm2-135m": 10}.get(name, 50)
    assert config.sft.checkpoint_every == config.train.checkpoint_every == every
    rows = [what for what, _ in plan(config, known_shape(config.model.path)).disk]
    assert sum("step checkpoints" in what for what in rows) == (every > 0)


def test_smoke_has_the_built_in_prompts_that_it_asks_for():
    data = pytest.importorskip("cream.data")
    config = load_recipe("smoke")
    rounds = data.split_rounds(
        data.load_prompts(config.data.prompts),
        config.run.iterations,
        config.data.prompts_per_iteration,
        config.run.seed,
    )
    assert [len(examples) for examples in rounds] == [config.data.prompts_per_iteration] * config.run.iterations
    assert len(data.load_conversations(config.data.sft)) >= config.data.sft_limit


@pytest.mark.parametrize("name", [*LLAMAS, LORA, "smollm2-135m"])
def test_hub_sources_are_ones_that_the_loader_knows(name):
    data = pytest.importorskip("cream.data")
    sources = load_recipe(name).data
    for source in sources.prompts + sources.sft + sources.evaluate:
        match = data.HUB_NAME.fullmatch(source)
        assert match and match["name"] in data.HUB
        assert match["config"] is None or match["config"] in data.HUB[match["name"]].configs


def test_no_such_recipe_lists_the_shipped_ones_and_the_nearest():
    with pytest.raises(UserError) as error:
        load_recipe("lama3-8b")
    assert all(name in str(error.value) for name in recipes.names())
    assert "did you mean 'llama3-8b'?" in str(error.value)


def test_a_shipped_name_wins_over_a_file_unless_it_looks_like_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smoke").write_text("run: {seed: 7}\ndata: {prompts: [a], sft: [a], evaluate: [a]}\n")
    (tmp_path / "smoke.yaml").write_text("run: {seed: 8}\ndata: {prompts: [a], sft: [a], evaluate: [a]}\n")
    assert load_recipe("smoke").run.seed == 0
    assert load_recipe("./smoke").run.seed == 7
    assert load_recipe("smoke.yaml").run.seed == 8
