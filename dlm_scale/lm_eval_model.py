"""Checkpoints as a model of lm-evaluation-harness: `python -m dlm_scale.lm_eval_model --model dlm_scale ...`.

The harness is imported only by `register` and when this module is run; the flags are its own, and
`--model_args pretrained=CKPT,num_draws=32,sampler=entropy` are the arguments of `HarnessModel`.

Of a masked checkpoint log p(continuation | context) is bounded from below by minus the conditional NELBO: the context
is never masked. Autoregressive checkpoints give it exactly.
"""

from __future__ import annotations

import hashlib
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from dlm_scale.errors import UsageError

NAME = "dlm_scale"
DEFAULT_NEW_TOKENS = 256


class HarnessModel:
    """The three requests of the harness. What a request is given depends on nothing but the request: not on the others,
    nor on their order or the batch size (but for rounding).

    pretrained: a run folder or checkpoint. num_draws: masks a continuation. sampler, steps: of generate_until.
    """

    def __init__(self, pretrained: str, device: str = "auto", batch_size: int | str = 16, num_draws: int = 32,
                 sampler: str | None = None, steps: int = 0, seed: int = 0, **_of_the_harness: Any):
        from dlm_scale.inference import load_for_inference

        self._set_up(load_for_inference(pretrained, device), 16 if batch_size == "auto" else int(batch_size),
                     int(num_draws), sampler, int(steps), int(seed))

    def _set_up(self, inference: Any, batch_size: int, num_draws: int, sampler: str | None, steps: int, seed: int):
        from dlm_scale.sampling.samplers import LEFT_TO_RIGHT

        if inference.is_gaussian:
            raise UsageError(f"{inference.checkpoint.path} is gaussian: it has no likelihood of a continuation given its "
                             "context; take a masked or autoregressive checkpoint")
        if inference.tokenizer is None:
            raise UsageError(f"{inference.checkpoint.path} was trained on synthetic tokens: it reads no text")
        self.inference, self.batch_size, self.num_draws, self.seed = inference, batch_size, num_draws, seed
        default = LEFT_TO_RIGHT if inference.is_autoregressive else "entropy"
        self.sampler, self.steps = sampler or default, steps

    @classmethod
    def of(cls, inference: Any, batch_size: int = 16, num_draws: int = 32, sampler: str | None = None, steps: int = 0,
           seed: int = 0) -> HarnessModel:
        """The same of a loaded checkpoint."""
        model = cls.__new__(cls)
        model._set_up(inference, batch_size, num_draws, sampler, steps, seed)
        return model

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log p(continuation | context) or its lower bound, whether greedy filling gives the continuation)."""
        pairs = [self._encode_pair(*request.args) for request in requests]
        found: list[Any] = [None] * len(pairs)
        for indices in _batches([(len(context) + len(rest)) for context, rest in pairs], self.batch_size):
            x_BL = np.array([[*pairs[i][0], *pairs[i][1]] for i in indices], np.int64)
            starts_B1 = np.array([[len(pairs[i][0])] for i in indices])
            maskable_BL = np.arange(x_BL.shape[1]) >= starts_B1
            greedy_B = self._is_greedy(torch.from_numpy(x_BL), torch.from_numpy(maskable_BL))
            for i, nats, is_greedy in zip(indices, self._nats(x_BL, maskable_BL), greedy_B):
                found[i] = (-nats, is_greedy)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts, in windows of the context length side by side, each without the text before it."""
        length, windows = self.inference.seq_len, []
        for i, request in enumerate(requests):
            ids = self.inference.tokenizer.encode(request.args[0])
            windows += [(i, ids[start : start + length]) for start in range(0, len(ids), length)]
        totals = [0.0] * len(requests)
        for indices in _batches([len(ids) for _, ids in windows], self.batch_size):
            x_BL = np.stack([windows[j][1] for j in indices]).astype(np.int64)
            for j, nats in zip(indices, self._nats(x_BL, np.ones(x_BL.shape, bool))):
                totals[windows[j][0]] -= nats
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Texts, up to the first of the request's `until`; reads `max_gen_toks`, `temperature`, `do_sample` too."""
        canvases = [self._canvas(*request.args) for request in requests]
        texts: list[Any] = [None] * len(canvases)
        kinds = [(len(context), new, temperature) for context, new, temperature, _ in canvases]
        for indices in _batches(kinds, self.batch_size):
            for i, ids in zip(indices, self._filled([canvases[i] for i in indices])):
                texts[i] = _cut(self.inference.tokenizer.decode(ids), canvases[i][3])
        return texts

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, split where the context's own ids end; its last spaces belong to the continuation."""
        encode, length = self.inference.tokenizer.encode, self.inference.seq_len
        stripped = context.rstrip(" ")
        continuation = context[len(stripped) :] + continuation
        head, whole = encode(stripped).tolist(), encode(stripped + continuation).tolist()
        rest = whole[len(head) :] if whole[: len(head)] == head else encode(continuation).tolist()
        if not 0 < len(rest) <= length:
            raise UsageError(f"a continuation of {len(rest)} tokens does not fit the checkpoint's context of {length}")
        return head[len(head) - min(len(head), length - len(rest)) :], rest

    def _nats(self, x_BL: np.ndarray, maskable_BL: np.ndarray) -> list[float]:
        """Nats of the maskable positions given the rest. A row's masks are drawn by a hash of its ids."""
        from dlm_scale import ops
        from dlm_scale.diffusion.autoregressive import shifted
        from dlm_scale.diffusion.draws import default_estimator
        from dlm_scale.diffusion.likelihood import row_sums, sums_of_draws
        from dlm_scale.engine.evaluation import cross_entropy_fn

        ce_fn = cross_entropy_fn(self.inference.model, self.inference.device)
        index_B = np.array([_hash(*row) for row in zip(x_BL, maskable_BL)])
        options = {"mask_id": self.inference.vocabulary.mask_id, "maskable_BL": maskable_BL}
        with torch.no_grad():
            if self.inference.is_autoregressive:
                draws = [shifted(x_BL, index_B, denominator=1.0, causal=ops.Causal(), **options)]
                sums = sums_of_draws(ce_fn, index_B, draws)
            else:
                sums = row_sums(ce_fn, x_BL, index_B, seed=self.seed, num_draws=self.num_draws,
                                estimator=default_estimator(self.num_draws), **options)
        return sums.weighted_ce_RK.mean(1).tolist()

    def _is_greedy(self, x_BL: torch.Tensor, open_BL: torch.Tensor) -> list[bool]:
        """Whether filling one position a pass with the likeliest token gives the row: the surest position first, or
        from left to right if the checkpoint is autoregressive. Rows leave at their first other token."""
        mask_id, inference = self.inference.vocabulary.mask_id, self.inference
        x_BL, open_BL = x_BL.to(inference.device), open_BL.to(inference.device).clone()
        is_greedy_B = torch.ones(len(x_BL), dtype=torch.bool, device=x_BL.device)
        while bool((live_B := is_greedy_B & open_BL.any(1)).any()):
            ask_BL = open_BL & live_B[:, None]
            if inference.is_autoregressive:
                ask_BL = ask_BL & (ask_BL.cumsum(1) == 1)
            flat_N = ask_BL.flatten().nonzero()[:, 0]
            score_N, best_N = inference.predict(torch.where(open_BL, mask_id, x_BL), flat_N).max(-1)
            score_BL = torch.full(x_BL.shape, -torch.inf, device=x_BL.device).masked_scatter(ask_BL, score_N)
            best_BL = torch.zeros_like(x_BL).masked_scatter(ask_BL, best_N)
            place_B1 = score_BL.argmax(1, keepdim=True)
            agrees_B = (best_BL.gather(1, place_B1) == x_BL.gather(1, place_B1))[:, 0]
            is_greedy_B &= agrees_B | ~live_B
            open_BL.scatter_(1, place_B1, open_BL.gather(1, place_B1) & ~live_B[:, None])
        return is_greedy_B.tolist()

    def _canvas(self, context: str, options: dict[str, Any]) -> tuple[list[int], int, float, list[str]]:
        """(context ids, new tokens, temperature, stop texts) of a request; a long context loses its beginning."""
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        new_tokens = min(int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS)), self.inference.seq_len)
        ids = self.inference.tokenizer.encode(context).tolist()
        ids = ids[len(ids) - min(len(ids), self.inference.seq_len - new_tokens) :]
        temperature = float(options.get("temperature") or 0.0) if options.get("do_sample", True) else 0.0
        return ids, new_tokens, temperature, until

    def _filled(self, canvases: list[tuple[list[int], int, float, list[str]]]) -> Iterator[list[int]]:
        """The new tokens of canvases of one shape and temperature."""
        from dlm_scale.evaluation.generative import fill

        (context, new_tokens, temperature, _), inference = canvases[0], self.inference
        x_BL = torch.tensor([ids + [inference.vocabulary.mask_id] * new_tokens for ids, *_ in canvases],
                            device=inference.device)
        is_fixed_BL = (torch.arange(x_BL.shape[1], device=x_BL.device) < len(context)).expand_as(x_BL)
        hashes = [_hash(np.array(ids, np.int64), np.zeros(0, bool)) & 0xFFFFFFFF for ids, *_ in canvases]
        made = fill(inference, x_BL, is_fixed_BL, self.sampler, self.steps, seed=self.seed, request_hashes=hashes,
                    sample_indices=[0] * len(canvases), temperature=temperature)
        yield from made.ids_BL[:, len(context) :].tolist()


def _batches(kinds: Sequence[Any], batch_size: int) -> Iterator[list[int]]:
    """Indices of items of one kind, at most `batch_size` together: nothing is ever padded."""
    groups = defaultdict(list)
    for i, kind in enumerate(kinds):
        groups[kind].append(i)
    for members in groups.values():
        yield from (members[start : start + batch_size] for start in range(0, len(members), batch_size))


def _hash(ids: np.ndarray, maskable: np.ndarray) -> int:
    """63 bits, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(ids.tobytes() + maskable.tobytes(), digest_size=8).digest(), "little") >> 1


def _cut(text: str, until: list[str]) -> str:
    """The text before the first of the stops."""
    return text[: min((at for stop in until if stop and (at := text.find(stop)) >= 0), default=len(text))]


def register() -> type:
    """Make the model known to the harness under its name. Raises UsageError where the harness is not installed."""
    from dlm_scale.data.optional import import_optional

    harness = import_optional("lm_eval.api.model", "the evaluation harness")
    registry = import_optional("lm_eval.api.registry", "the evaluation harness")

    class DlmScaleModel(HarnessModel, harness.LM):
        """HarnessModel as the harness wants it."""

        def __init__(self, *args: Any, **kwargs: Any):
            harness.LM.__init__(self)
            HarnessModel.__init__(self, *args, **kwargs)

    return registry.register_model(NAME)(DlmScaleModel)


def main() -> None:
    """The harness's own command line, with this model known to it."""
    from dlm_scale.data.optional import import_optional

    register()
    import_optional("lm_eval.__main__", "the evaluation harness").cli_evaluate()


if __name__ == "__main__":
    from dlm_scale.cli import exit_code

    sys.exit(exit_code(main, NAME))
