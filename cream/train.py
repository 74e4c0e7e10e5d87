"""CREAM from one command: M0 is fine-tuned to M1, then each iteration makes the next model from the last one's answers.

    python -m cream.train                               the embedded recipe: a small real model, built-in questions
    python -m cream.train --config llama3-8b            the paper's settings
    python -m cream.train --config FILE.yaml --train.lr 1e-6 --resume
    torchrun --nproc-per-node=8 -m cream.train --config llama3-8b

`run` is the algorithm. Below it, each stage says what it reads, what it writes and on which settings it depends; the
run skips a stage whose inputs, settings and outputs are as its ledger recorded them.
"""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from cream import consistency, dist, doctor, dpo, fuse, lora, plan, report, sft
from cream.attention import choose
from cream.checkpoint import hash_tree
from cream.config import Config, deciding, parse, to_yaml
from cream.data import (
    Example,
    encode_prompt,
    load_conversations,
    load_prompts,
    read_examples,
    save_examples,
    split_rounds,
)
from cream.evaluate import evaluate
from cream.log import Metrics, UserError, entry, progress, say
from cream.model import ADAPTER, Resident, choose_dtype, config_value, device, fetch, import_model, load_tokenizer
from cream.rows import is_file_name
from cream.run import Follower, Run
from cream.sample import sample
from cream.score import score_all
from cream.work import Work, read_rows
from cream_kernels import native
from cream_kernels.products import multiplies_halves


@entry
def main(argv: Sequence[str] | None = None, *, until: str | None = None) -> None:
    """Run every stage that is due, up to `until` where given, and show what came out."""
    argv = sys.argv[1:] if argv is None else list(argv)
    with dist.session():
        run(argv, until)


def run(argv: Sequence[str], until: str | None) -> None:
    """`main` on one rank. All of them run this; rank 0 decides what is due, and writes."""
    config = parse(argv, prog="python -m cream.train", description="Train a model by CREAM, from SFT to evaluation.")
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    dist.connect(config.run.timeout)
    job = Job(config, argv, until)
    if reason := native.why_not():
        say(f"no native library ({reason}): torch draws the tokens, which is slower")
    with job.run:
        try:
            models = [job.initial()]
            rounds, questions = job.prompts(models[0])
            job.evaluate(0, models[0], questions)
            models.append(job.fine_tune(models[0]))
            job.evaluate(1, models[1], questions)
            for t in range(1, config.run.iterations + 1):
                policy, previous, reference = models[t], job.previous(t, models), models[0]
                responses = job.sample(t, policy, rounds[t - 1])
                scores = job.score(t, policy, previous, reference, responses)
                pairs = job.rank(t, scores, responses, rounds[t - 1])
                models.append(job.train(t, policy, pairs))
                job.evaluate(t + 1, models[t + 1], questions)
        except Finished:
            pass
        page = report.write(job.run.directory) if dist.is_main() else None
    if dist.is_main():
        print(report.table(job.run.directory))
        say(f"report: {page}")


class Finished(Exception):
    """The last stage that was asked for is done."""


class Job:
    """The stages of one run and the one module whose weights they swap."""

    def __init__(self, config: Config, argv: Sequence[str], until: str | None):
        """Everything that the user may have got wrong in data and model names is looked at before the run is opened."""
        self.config, self.until = config, until
        known = stage_names(config.run.iterations)
        if config.run.only is not None and config.run.only not in known:
            raise UserError(f"run.only: no stage {config.run.only!r}; there are {', '.join(known)}")
        data = config.data
        if config.lora.r:
            if dist.size() > 1:
                raise UserError("lora.r: adapters are trained by one process; start without torchrun, or set it to 0")
            lora.check_peft()
        if config.sft.path is not None:
            lora.given(config.sft.path, config.model, config.lora)
        with dist.main_first():
            self.source, self.given_as = fetch(config.model)
            self.examples = load_prompts(data.prompts)
            self.questions = load_prompts(data.evaluate, split="test", graded=True) if data.evaluate else []
            self.conversations = load_conversations(data.sft) if config.sft.enabled else []
        directory, main = Path(config.run.dir), dist.is_main()
        self.run = Run(directory, to_yaml(config), resume=config.resume) if main else Follower(directory)
        self.metrics = Metrics(directory / "metrics.jsonl", writes=main)
        self.command = shlex.join(["python", "-m", "cream.train", *(a for a in argv if a != "--resume")])
        # What changes the numbers of every stage that computes, besides the stage's own settings; "auto" is resolved,
        # so that a run that goes on on another machine notices.
        dtype = choose_dtype(config.model.dtype)
        backend = choose(config.model.attention, dtype).name
        if dtype == torch.bfloat16 and not multiplies_halves(device()):
            say("model.dtype: this CPU does not multiply bfloat16; float32, which auto takes, is several times as fast")
        self.numerics = {"seed": config.run.seed, "dtype": str(dtype), "attention": backend}
        fuse.check(config.model.fuse)
        if config.model.fuses(device().type):
            self.numerics["fused"] = True

    def stage(
        self,
        name: str,
        body: Callable[[Work], object],
        inputs: dict,
        outputs: list[str],
        settings: dict,
        *,
        by_all: bool = False,
    ) -> list[Path]:
        """Run a stage if it is due. With --run.only that one alone runs; the others' results stand as they are.

        Rank 0 runs the body; all ranks do where it is `by_all`, and it writes the outputs on rank 0 alone.
        """
        if not by_all and not dist.is_main():
            body = idle
        if self.config.run.only in (None, name):
            body = functools.partial(within_memory, name, body)
            paths = self.run.stage(name, body, inputs=inputs, outputs=outputs, settings=settings)
        else:
            paths = self.run.finished(name, outputs)
        if name in (self.config.run.only, self.until):
            raise Finished
        return paths

    def initial(self) -> Path:
        """M0 as a Hugging Face directory: the user's own, the hub's, or one made in the run from GGUF or an adapter."""
        if self.given_as is None:
            m0 = Path(self.source)
        else:
            make, inputs = import_model, {"gguf": Path(self.source, self.given_as)}
            if self.given_as == ADAPTER:
                adapter, base = Path(self.source), lora.base_of(Path(self.source), self.config.model)
                make, inputs = lora.import_adapter, {"adapter": adapter, "base": base}
            [m0] = self.stage(
                "import",
                lambda work: make(self.config.model, work.path("m0")),
                inputs,
                ["m0"],
                {"dtype": self.numerics["dtype"]},
            )
        self.tokenizer = load_tokenizer(m0)
        self.m0 = m0
        model = replace(self.config.model, gradient_checkpointing=self.recomputed(m0))
        self.resident = Resident(m0, model)
        if self.config.lora.r:
            on_hub = self.given_as is None and not Path(model.path).expanduser().is_dir()
            base = model.path if on_hub else str(m0.absolute())
            self.resident = lora.Adapted(m0, model, self.config.lora, base=base, seed=self.config.run.seed)
            self.numerics["base"] = hash_tree(m0)  # a checkpoint's own hash says nothing of what it is over
        return m0

    def recomputed(self, m0: Path) -> str:
        """model.gradient_checkpointing, "auto" decided by the memory plan."""
        config = self.config
        if config.model.gradient_checkpointing != "auto":
            return config.model.gradient_checkpointing
        name, memory = doctor.device_memory()
        try:
            shape = doctor.find_shape(replace(config, model=replace(config.model, path=str(m0))))
        except UserError as error:
            say(f"model.gradient_checkpointing: full ({error})")
            return "full"
        dtype = self.numerics["dtype"].removeprefix("torch.")
        memory_there = memory * 1e9 / 2**30  # GiB count as GB: see plan
        mode = plan.gradient_checkpointing(config, shape, dtype, memory_there, device().type)
        say(f"model.gradient_checkpointing: {mode} ({name}, {memory / 1e9:.1f} GB)")
        return mode

    def prompts(self, m0: Path) -> tuple[list[Path], Path]:
        """D_U split over the iterations, and the held-out questions."""
        data, iterations = self.config.data, self.config.run.iterations
        context = config_value(m0, "max_position_embeddings")

        def body(work: Work) -> None:
            rounds = split_rounds(
                self.fitting("data.prompts", self.examples, context),
                iterations,
                data.prompts_per_iteration,
                self.config.run.seed,
            )
            for t, examples in enumerate(rounds, start=1):
                save_examples(work.path(f"prompts/iter{t}.jsonl"), examples)
            by_task: dict[str, list[Example]] = {}
            for example in self.fitting("data.evaluate", self.questions, context) if self.questions else []:
                by_task.setdefault(example.task, []).append(example)
            questions = []
            for of in by_task.values():
                count = min(data.evaluate_limit or len(of), len(of))
                questions += split_rounds(of, 1, count, self.config.run.seed)[0]
            save_examples(work.path("prompts/evaluate.jsonl"), questions)
            work.facts(prompts=sum(map(len, rounds)), questions=len(questions))

        settings = {"iterations": iterations, "seed": self.config.run.seed, "context": context, **deciding(data)}
        del settings["sft"], settings["sft_limit"]
        outputs = [f"prompts/iter{t}.jsonl" for t in range(1, iterations + 1)] + ["prompts/evaluate.jsonl"]
        inputs = {str(f): f for f in local_files([*data.prompts, *data.evaluate])} | {
            "tokenizer": m0 / "tokenizer.json"
        }
        *rounds, questions = self.stage("prompts", body, inputs, outputs, settings)
        return rounds, questions

    def fitting(self, field: str, examples: Sequence[Example], context: int) -> list[Example]:
        """The examples within data.max_prompt_tokens; the others are counted. One beyond the context is an error."""
        limit, kept = self.config.data.max_prompt_tokens, []
        with progress(len(examples), field, "prompts") as bar:
            for example in examples:
                tokens = len(encode_prompt(self.tokenizer, example.messages))
                if tokens >= context:
                    raise UserError(
                        f"{field}: prompt {example.id} has {tokens} tokens; the model's context is {context}: "
                        "remove or shorten it"
                    )
                if tokens <= limit:
                    kept.append(example)
                bar.update(1)
        if len(kept) < len(examples):
            left_out = len(examples) - len(kept)
            say(f"{field}: {left_out} of {len(examples)} prompts exceed data.max_prompt_tokens={limit}: left out")
        if not kept:
            raise UserError(f"{field}: no prompt is within data.max_prompt_tokens={limit}")
        return kept

    def fine_tune(self, m0: Path) -> Path:
        """M1: the user's own, or SFT of M0. Keeps the half-way checkpoint where the first round wants it."""
        config, data = self.config.sft, self.config.data
        if not config.enabled:
            if "sft" in (self.until, self.config.run.only):
                raise UserError("sft.enabled is false: there is no SFT to run")
            return self.given(config.path) if config.path else m0
        half = self.config.score.first_round == "sft_half"

        def body(work: Work) -> None:
            conversations = self.conversations
            if data.sft_limit is not None:
                chosen = sorted(dpo.epoch_order(len(conversations), 0, self.config.run.seed)[: data.sft_limit])
                conversations = [conversations[i] for i in chosen]
            model = self.resident.at(m0, gradients=True)
            facts = {"SFT conversations": len(conversations), **self.lineage(m0, local_files(data.sft))}

            def save_half() -> None:
                self.resident.save(work.path("sft/half"), self.tokenizer, "M1", "M0", facts)
                if dist.is_main():
                    work.finish("sft/half")

            sft.train(
                model,
                self.tokenizer,
                conversations,
                config,
                work,
                self.metrics,
                seed=self.config.run.seed,
                optim=self.config.optim,
                halfway=save_half if half else None,
            )
            self.resident.save(work.path("sft/model"), self.tokenizer, "M1", "M0", facts)

        settings = {**self.numerics, **deciding(config), **self.learning()}
        settings |= {"sources": data.sft, "limit": data.sft_limit}
        inputs = {"m0": m0} | {str(f): f for f in local_files(data.sft)}
        outputs = ["sft/model"] + ["sft/half"] * half
        m1 = self.stage("sft", body, inputs, outputs, settings, by_all=True)[0]
        self.merge(1, m1)
        return m1

    def given(self, path: str) -> Path:
        """The user's own M1, which must read and write M0's tokens."""
        m1 = lora.given(path, self.config.model, self.config.lora)
        if not self.config.lora.r and load_tokenizer(m1).get_vocab() != self.tokenizer.get_vocab():
            raise UserError(f"sft.path: {path} has another vocabulary than model.path: the two cannot score each other")
        return m1

    def previous(self, t: int, models: Sequence[Path]) -> Path:
        """theta_(t-1); in the first round M0, or the half-way SFT checkpoint where asked."""
        half = t == 1 and self.config.score.first_round == "sft_half" and self.config.sft.enabled
        return self.run.directory / "sft/half" if half else models[t - 1]

    def sample(self, t: int, policy: Path, prompts: Path) -> Path:
        config, seed, output = self.config.sample, self.config.run.seed, f"iter{t}/responses.jsonl"

        def body(work: Work) -> None:
            model = self.resident.at(policy) if config.engine == "own" else self.resident.model
            examples = read_examples(prompts)
            rows = sample(model, self.tokenizer, examples, config, work, seed=seed, iteration=t, checkpoint=policy)
            if dist.is_main():
                work.write_rows(output, rows)

        inputs, settings = {"policy": policy, "prompts": prompts}, {**self.numerics, **deciding(config)}
        return self.stage(f"iter{t}/sample", body, inputs, [output], settings, by_all=True)[0]

    def score(self, t: int, policy: Path, previous: Path, reference: Path, responses: Path) -> Path:
        checkpoints = {"policy": policy, "previous": previous, "reference": reference}
        config, output = self.config.score, f"iter{t}/scores.parquet"

        def body(work: Work) -> None:
            table = score_all(self.resident, checkpoints, read_rows(responses), config, work, iteration=t)
            import pyarrow.parquet

            if dist.is_main():
                pyarrow.parquet.write_table(table, work.path(output))

        inputs, settings = {**checkpoints, "responses": responses}, {**self.numerics, **deciding(config)}
        return self.stage(f"iter{t}/score", body, inputs, [output], settings, by_all=True)[0]

    def rank(self, t: int, scores: Path, responses: Path, prompts: Path) -> Path:
        config = self.config.consistency
        outputs = [f"iter{t}/pairs.jsonl", f"iter{t}/ranking.jsonl", f"iter{t}/ranking.json"]

        def body(work: Work) -> None:
            examples = read_examples(prompts)
            with progress(len(examples), f"iter{t}/rank", "prompts") as bar:
                pairs, rankings, summary = consistency.rank_round(scores, read_rows(responses), examples, config)
                bar.update(len(examples))
            if not pairs:
                why = ", ".join(f"{n} {reason}" for reason, n in summary["dropped"].items() if n)
                raise UserError(
                    f"iter{t}/rank: none of {summary['prompts']} prompts make a pair ({why}); sample more responses, "
                    "or at a higher temperature, or fine-tune first (without SFT all rewards of the first round are 0)"
                )
            for output, rows in zip(outputs, (pairs, [asdict(r) for r in rankings], [summary]), strict=True):
                work.write_rows(output, rows)

        inputs = {"scores": scores, "responses": responses, "prompts": prompts}
        return self.stage(f"iter{t}/rank", body, inputs, outputs, deciding(config))[0]

    def train(self, t: int, policy: Path, pairs: Path) -> Path:
        config, stage, output = self.config.train, f"iter{t}/train", f"iter{t}/model"

        def body(work: Work) -> None:
            rows = read_rows(pairs)
            model = self.resident.at(policy, gradients=True)
            optim, seed = self.config.optim, self.config.run.seed
            dpo.train(model, rows, config, work, self.metrics, stage=stage, seed=seed, optim=optim)
            [summary] = read_rows(pairs.with_name("ranking.json"))
            facts = {"pairs": len(rows), "mean tau": summary["tau_mean"], "mean agreement": summary["agreement_mean"]}
            facts |= self.lineage(policy, [pairs])
            self.resident.save(work.path(output), self.tokenizer, f"M{t + 1}", f"M{t}", facts)

        inputs = {"policy": policy, "pairs": pairs}
        settings = {**self.numerics, **deciding(config), **self.learning()}
        trained = self.stage(stage, body, inputs, [output], settings, by_all=True)[0]
        self.merge(t + 1, trained)
        return trained

    def learning(self) -> dict[str, dict]:
        """The settings that both trainings depend on."""
        optim = {"optim": deciding(self.config.optim)}
        return optim | {"lora": deciding(self.config.lora)} if self.config.lora.r else optim

    def merge(self, t: int, model: Path) -> None:
        """M<t> as a whole model beside its adapter, where lora.merge_on_export asks for it."""
        stage, chosen = merge_stage(t), self.config.lora.merge_on_export
        asked = stage in (self.until, self.config.run.only)
        due = chosen == "all" or (chosen == "last" and t == self.config.run.iterations + 1)
        if not self.config.lora.r and asked:
            raise UserError(f"{stage}: lora.r is 0, so there is no adapter to merge")
        if asked or (self.config.lora.r and due and self.config.run.only is None):
            output = str(Path(stage).with_name("merged"))

            def body(work: Work) -> None:
                lora.write_merged(work.path(output), self.m0, model, self.config.model, f"M{t}")

            inputs, settings = {"m0": self.m0, "adapter": model}, {"dtype": self.numerics["dtype"]}
            self.stage(stage, body, inputs, [output], settings)

    def evaluate(self, t: int, model: Path, questions: Path) -> None:
        config, stage = self.config.evaluate, f"eval/m{t}"
        wanted = config.enabled and (config.models == "all" or t == self.config.run.iterations + 1)
        if not wanted and stage not in (self.until, self.config.run.only):
            return
        if not self.questions:
            raise UserError("data.evaluate is empty: name a file, a hub data set or a builtin:... source")

        def body(work: Work) -> None:
            module = self.resident.at(model)
            result, rows = evaluate(
                module,
                self.tokenizer,
                read_examples(questions),
                config,
                work,
                name=f"M{t}",
                stage=stage,
                cuda_graphs=self.config.sample.cuda_graphs,
            )
            if dist.is_main():
                work.write_rows(f"{stage}.json", [result])
                work.write_rows(f"{stage}.jsonl", rows)

        inputs, settings = {"model": model, "questions": questions}, {**self.numerics, **deciding(config)}
        self.stage(stage, body, inputs, [f"{stage}.json", f"{stage}.jsonl"], settings, by_all=True)

    def lineage(self, parent: Path, files: Sequence[Path]) -> dict[str, str]:
        """What a model card says of where a model comes from."""
        return {
            "parent SHA-256": hash_tree(parent),
            **{f"SHA-256 of {file.name}": hash_tree(file) for file in files},
            "command": f"`{self.command}`",
        }


def idle(work: Work) -> None:
    """What a rank does in a stage that is rank 0's."""


# What a stage's memory depends on, by the part of its name that says what it does.
LOWER = {"sft": "sft.batch_tokens", "sample": "sample.batch_size", "score": "score.batch_tokens"}
LOWER |= {"train": "train.batch_tokens", "eval": "evaluate.batch_size and evaluate.batch_tokens"}


def within_memory(name: str, body: Callable[[Work], object], work: Work) -> None:
    """The body of the stage of that name. Raises UserError, with what to lower, where the GPU's memory is too small."""
    try:
        body(work)
    except torch.OutOfMemoryError as error:
        said = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        field = next((LOWER[part] for part in name.split("/") if part in LOWER), None)
        advice = f"lower {field} and start again with --resume" if field else "the model needs a larger GPU"
        raise UserError(f"{name}: {said}; {advice} (python -m cream.doctor says what fits)") from error


def stage_names(iterations: int) -> list[str]:
    """The stages of a run in their order."""
    rounds = (
        [f"iter{t}/sample", f"iter{t}/score", f"iter{t}/rank", f"iter{t}/train", merge_stage(t + 1), f"eval/m{t + 1}"]
        for t in range(1, iterations + 1)
    )
    first = ["import", "prompts", "eval/m0", "sft", merge_stage(1), "eval/m1"]
    return [*first, *(name for names in rounds for name in names)]


def merge_stage(t: int) -> str:
    """The stage that writes M<t>, an adapter, as a whole model."""
    return "sft/merge" if t == 1 else f"iter{t - 1}/merge"


def local_files(sources: Sequence[str]) -> list[Path]:
    """The sources that are files; what is built in or on the hub counts by its name."""
    return [Path(source) for source in sources if is_file_name(source)]


if __name__ == "__main__":
    main()
