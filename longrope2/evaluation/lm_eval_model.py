"""Our model for lm-evaluation-harness (``--model longrope2``).

The harness's own Hugging Face model pads batches and lets the padded length choose the RoPE of all
rows, and it cuts prompts that are too long with a warning. Here a sequence's own length (context
and continuation, BOS included) decides, padding is never read, and a prompt that does not fit is an
error. Every text begins with what starts a document (``model.document_start``): by default what the
tokenizer itself adds, as in the harness's own model.

Shape legend: B = rows, T = tokens, K = scored tokens, V = vocabulary.
"""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from longrope2.config import DocumentStart, ModelConfig, SlidingWindow
from longrope2.corpora.tokenizer import start_ids
from longrope2.errors import DataError
from longrope2.evaluation.before import read_factors_beside
from longrope2.inference.generation import TextStream, generate_tokens, window_for_length
from longrope2.model.folder import given_folder
from longrope2.model.loading import load_to_run, load_tokenizer, rope_geometry
from longrope2.model.windowed import WindowedModel
from longrope2.rope.factors import RescaleFactors, Window
from longrope2.rope.methods import RopeMethod, closed_form_factors

_DEFAULT_NEW_TOKENS = 256  # the harness's own default
_BATCH_TOKENS = 8192


@register_model("longrope2")
class LongRope2LM(TemplateLM):
    """A windowed model behind the harness's three requests.

    Attributes:
        sides: Task and question -> RoPE side(s) it was read with.
    """

    def __init__(
        self,
        model: str,
        original_len: int,
        target_len: int,
        checkpoint: str | None = None,
        factors: str | None = None,
        rope: str = "none",
        document_start: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        sliding_window: str = "keep",
    ) -> None:
        """From ``--model_args model=...,original_len=...,target_len=...``.

        Args:
            model: Folder or hub id of the base model.
            original_len: L0.
            target_len: L.
            checkpoint: Folder of a trained checkpoint, which brings its own factors.
            factors: Factors file for the base model.
            rope: Closed-form rescaling (pi, ntk, yarn, ...), if neither of the two is given.
            document_start: auto, bos or none, as ``model.document_start``.
            batch_size: Not used; batches are sized by tokens.
            max_batch_size: Not used.
            device: Not used; a GPU is used if there is one, which the harness does not know.
            sliding_window: ``drop`` for full attention in a model with a shorter window.
        """
        window = SlidingWindow(sliding_window)
        given = ModelConfig("", model, original_len, sliding_window=window)
        folder = Path(checkpoint) if checkpoint else given_folder(given, target_len)
        if checkpoint:
            found = read_factors_beside(folder, original_len, target_len)
        elif factors:
            found = RescaleFactors.from_json(Path(factors).read_text(encoding="utf-8"))
        else:
            geometry = rope_geometry(folder, original_len)
            found = closed_form_factors(RopeMethod(rope), geometry, target_len)
        if document_start not in {rule.value for rule in DocumentStart}:
            raise DataError(f"document_start={document_start} must be auto, bos or none")
        rule, tokenizer = DocumentStart(document_start), load_tokenizer(folder)
        self._set_up(load_to_run(folder, found), tokenizer, _BATCH_TOKENS, rule)

    @classmethod
    def around(
        cls,
        model: WindowedModel,
        tokenizer: Any,
        batch_tokens: int = _BATCH_TOKENS,
        document_start: DocumentStart = DocumentStart.auto,
    ) -> "LongRope2LM":
        """Around a model that is loaded already."""
        lm = cls.__new__(cls)
        lm._set_up(model, tokenizer, batch_tokens, document_start)
        return lm

    def _set_up(
        self, model: WindowedModel, tokenizer: Any, batch_tokens: int, document_start: DocumentStart
    ) -> None:
        TemplateLM.__init__(self)
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens
        self.start_ids = start_ids(tokenizer, document_start)
        self.original_len = model.factors.geometry.original_len
        self.target_len = model.factors.target_len
        self.sides: dict[tuple[str, int], set[str]] = defaultdict(set)

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Id in front of a continuation without context: BOS if there is one, as the harness."""
        bos_id = self.tokenizer.bos_token_id
        return bos_id if isinstance(bos_id, int) else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        """For the harness's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids, behind ``start_ids`` unless ``add_special_tokens`` is False; none is special."""
        ids = self.tokenizer(string, add_special_tokens=False).input_ids
        return ids if add_special_tokens is False else self.start_ids + ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it."""
        pairs = []
        for request in requests:
            arguments: Any = request.args
            context, continuation = arguments
            if context:
                context_ids, ids = self._encode_pair(context, continuation)
            else:
                context_ids = [self.prefix_token_id]
                ids = self.tok_encode(continuation, add_special_tokens=False)
            pairs.append(((context, continuation), context_ids, ids))
            self._note(request, len(context_ids) + len(ids))
        return self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """Batches of one RoPE side each, the longest first."""
        lengths = [len(context_ids) + len(ids) for _, context_ids, ids in requests]
        for length in lengths:
            self._check_fits(length)
        order = sorted(range(len(requests)), key=lambda i: -lengths[i])
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            for batch in self._batches(order, lengths):
                scored = self._score([requests[i][1:] for i in batch])
                for index, result in zip(batch, scored, strict=True):
                    results[index] = result
                bar.update(len(batch))
        return results

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, each in one window."""
        pairs = []
        for request in requests:
            (text,) = request.args
            ids = self.tok_encode(text, add_special_tokens=False)
            pairs.append((("", text), [self.prefix_token_id], ids))
            self._note(request, 1 + len(ids))
        return [score for score, _ in self._loglikelihood_tokens(pairs, disable_tqdm=disable_tqdm)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, each up to the first of its stop strings."""
        shown = tqdm(requests, desc="answers", disable=disable_tqdm)
        return [self._generate(request) for request in shown]

    def _generate(self, request: Instance) -> str:
        arguments: Any = request.args
        context, options = arguments
        given = {key: value for key, value in options.items() if value is not None}
        # It knows the several names of the longest answer; do_sample=false outranks a temperature.
        wanted: Any = normalize_gen_kwargs(given, _DEFAULT_NEW_TOKENS)
        if wanted["do_sample"]:
            fault = f"task {request.task_name} asks for sampling; answers here are greedy"
            raise DataError(f"{fault}: set do_sample=false")
        stops, limit = list(wanted["until"]), wanted["max_gen_toks"]
        prompt_ids = self.tok_encode(context)
        self._check_fits(len(prompt_ids) + limit)
        stream, text, used = TextStream(self.tokenizer, prompt_ids), "", set()
        options: Any = {"max_new_tokens": limit, "stop_ids": {self.eot_token_id}}
        for token in generate_tokens(self.model, prompt_ids, **options):
            used.add(token.window.value)
            if token.token_id == self.eot_token_id:
                break
            text += stream.push(token.token_id)
            if any(stop and stop in text for stop in stops):
                break
        else:
            text += stream.finish()
        self.sides[str(request.task_name), int(request.doc_id or 0)] |= used
        ends = [place for stop in stops if stop and (place := text.find(stop)) >= 0]
        return text[: min(ends, default=len(text))]

    def _batches(self, order: Sequence[int], lengths: Sequence[int]) -> list[list[int]]:
        """Neighbours of one RoPE side whose padded tokens fit together."""
        batches: list[list[int]] = []
        for index in order:
            last = batches[-1] if batches else []
            same = bool(last) and self._window(lengths[last[0]]) is self._window(lengths[index])
            if same and lengths[last[0]] * (len(last) + 1) <= self.batch_tokens:
                last.append(index)
            else:
                batches.append([index])
        return batches

    @torch.inference_mode()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """One forward pass; rows are padded on the right, where causal attention never looks."""
        rows = [context_ids + ids for context_ids, ids in pairs]
        tokens_BT = torch.full((len(rows), max(map(len, rows))), self.eot_token_id)
        for number, row in enumerate(rows):
            tokens_BT[number, : len(row)] = torch.tensor(row)
        tokens_BT = tokens_BT.to(self.model.hf.device)
        hidden_BTH = self.model.hidden_states(tokens_BT[:, :-1], self._window(len(rows[0])))
        head, results = self.model.hf.get_output_embeddings(), []
        for number, (context_ids, ids) in enumerate(pairs):
            first, stop = len(context_ids), len(context_ids) + len(ids)
            logits_KV = head(hidden_BTH[number, first - 1 : stop - 1]).float()
            targets_K = tokens_BT[number, first:stop]
            log_probs_KV = torch.log_softmax(logits_KV, dim=-1)
            log_probs_K = log_probs_KV.gather(-1, targets_K[:, None]).squeeze(-1)
            greedy = bool((logits_KV.argmax(-1) == targets_K).all())
            results.append((float(log_probs_K.double().sum()), greedy))
        return results

    def _window(self, num_tokens: int) -> Window:
        return window_for_length(num_tokens, self.original_len)

    def _note(self, request: Instance, num_tokens: int) -> None:
        place = str(request.task_name), int(request.doc_id or 0)
        self.sides[place].add(self._window(num_tokens).value)

    def _check_fits(self, num_tokens: int) -> None:
        if num_tokens > self.target_len:
            raise DataError(
                f"a question of {num_tokens} tokens (new ones included) exceeds the window of "
                f"{self.target_len}; nothing is cut here: use fewer examples (num_fewshot), a "
                "smaller max_gen_toks, or leave the task out"
            )
