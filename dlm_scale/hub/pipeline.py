"""`pipeline("text-diffusion")`: text from a prompt, whole or block by block, at once or as a stream."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import Pipeline

from dlm_scale.sampling.engine import stream
from dlm_scale.sampling.samplers import resolve

TASK = "text-diffusion"
SAMPLERS = {  # (use_confidence, allow_edits) -> sampler
    (False, False): "ancestral",
    (True, False): "low_confidence",
    (False, True): "remdm",
}
NEW_TOKENS = 256  # where no max_length is given
DEFAULTS = {
    "num_steps": 50,
    "allow_edits": False,
    "use_confidence": False,
    "stop_token": None,
    "block_size": None,
    "sampler": None,
    "num_samples": 1,
    "seed": 0,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
}


class TextDiffusionPipeline(Pipeline):
    """pipe(prompt, ...) -> {"decoded_texts": [text], "final_ids": [ids], "num_passes": [n]}, the prompt in front.

    num_steps       most passes of a text, or of each block (default 50)
    use_confidence  reveal the tokens first that the model is surest of, instead of any
    allow_edits     mask revealed tokens again now and then and write them anew (ReMDM); not with use_confidence
    stop_token      a token's name, or text of one token: the text ends before it
    max_length      tokens of prompt and answer together (default: 256 new ones, or what the context leaves)
    block_size      write so many tokens at a time, left to right; only then may max_length exceed the context
    sampler         any of sampling.SAMPLERS by name, in place of the two flags above
    num_samples     how many texts (default 1); seed: same seed, same text (default 0)
    temperature, top_k, top_p   as in `dlm sample`
    """

    _load_processor = _load_image_processor = _load_feature_extractor = False
    _load_tokenizer = True

    def _sanitize_parameters(self, max_length: int | None = None, **settings: Any) -> tuple[dict, dict, dict]:
        unknown = set(settings) - set(DEFAULTS)
        if unknown:
            raise ValueError(
                f"{sorted(unknown)} are no settings of this pipeline; there are max_length, {', '.join(DEFAULTS)}"
            )
        return {}, {**({} if max_length is None else {"max_length": max_length}), **settings}, {}

    def preprocess(self, prompt: str) -> dict[str, Any]:
        if not isinstance(prompt, str):
            raise ValueError(f"a prompt is a text, not {type(prompt).__name__}: for messages, see apply_chat_template")
        return {"ids": self.tokenizer.encode(prompt, add_special_tokens=False), "hash": zlib.crc32(prompt.encode())}

    def _forward(self, prompt: dict[str, Any], **settings: Any) -> dict[str, Any]:
        *_, (ids, passes) = self._frames(prompt, **settings)
        return {"ids": ids, "passes": passes}

    def postprocess(self, made: dict[str, Any]) -> dict[str, Any]:
        texts = [self._text(ids) for ids in made["ids"]]
        return {"decoded_texts": texts, "final_ids": made["ids"], "num_passes": made["passes"]}

    def stream_generation(self, input_text: str, **settings: Any) -> Iterator[str]:
        """The text after every pass, masks shown by their token, the finished one last. Settings as of pipe()."""
        for ids, _ in self._frames(self.preprocess(input_text), **settings):
            yield self._text(ids[0])

    def stream_semi_autoregressive_generate(
        self, input_text: str, block_size: int = 128, max_length: int = 2048, **settings: Any
    ) -> Iterator[str]:
        """The same, block by block, of any length."""
        yield from self.stream_generation(input_text, block_size=block_size, max_length=max_length, **settings)

    def _text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _frames(self, prompt: dict[str, Any], max_length: int | None = None, **changes: Any) -> Iterator[tuple]:
        """(ids of each sample, passes of each) after every pass; the last is cut at the stop token."""
        settings, context = DEFAULTS | changes, self.model.config.seq_len
        block_size = settings.pop("block_size")
        ids, most = prompt["ids"], context if block_size is None else 2**31
        if max_length is None:
            max_length = min(most, len(ids) + NEW_TOKENS)
        block_size = block_size or max_length - len(ids)
        if not len(ids) < max_length <= most or not 0 < block_size <= context:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, max_length is {max_length}, block_size {block_size}, the "
                f"context {context} tokens: a longer max_length needs block_size, at most the context"
            )
        stop_id = self._stop_id(settings.pop("stop_token"))
        texts, passes = [], []
        for sample in range(settings.pop("num_samples")):
            texts, passes = [*texts, ids], [*passes, 0]
            options = self._sampling(settings, sample, stop_id)
            for frame, count in self._blocks(ids, prompt["hash"], block_size, max_length, options):
                texts[sample], passes[sample] = frame, passes[sample] + count
                yield list(texts), list(passes)
            if stop_id in texts[sample][len(ids) :]:
                texts[sample] = texts[sample][: texts[sample].index(stop_id, len(ids))]
                yield list(texts), list(passes)

    def _blocks(self, ids: list[int], hash_: int, block_size: int, max_length: int, options: dict) -> Iterator[tuple]:
        """(all ids, passes since the last frame) after every pass; a block sees what of the text the context holds."""
        block = 0
        while len(ids) < max_length:
            size = min(block_size, max_length - len(ids))
            seen = ids[max(0, len(ids) + size - self.model.config.seq_len) :]
            x_BL = torch.tensor([seen + [options["mask_id"]] * size], device=self.model.device)
            is_fixed_BL = torch.arange(x_BL.shape[1], device=x_BL.device)[None] < len(seen)
            own = zlib.crc32(b"%d" % block, hash_) if block else hash_
            count = 0
            for state in stream(self.model.predict, x_BL, is_fixed_BL, request_hashes=[own], **options):
                frame, now = ids + state.x_BL[0, len(seen) :].tolist(), int(state.nfe_B[0])
                yield frame, now - count
                count = now
            ids, block = frame, block + 1
            if set(options["stop_ids"]) & set(ids[-size:]):
                return

    def _sampling(self, settings: dict[str, Any], sample: int, stop_id: int | None) -> dict[str, Any]:
        options = dict(settings)
        flags = options.pop("use_confidence"), options.pop("allow_edits")
        named = options.pop("sampler")
        if named is None and flags not in SAMPLERS:
            raise ValueError(
                "use_confidence and allow_edits exclude each other: an order by confidence knows no way back"
            )
        if resolve(named or SAMPLERS[flags]).edits:
            raise ValueError(f"sampler {named!r} edits visible tokens, and this model does not say whether it has learnt "
                             "to; use `dlm sample` with the checkpoint that it was made of")
        stop_ids = [] if stop_id is None else [stop_id]
        return options | {"sampler": named or SAMPLERS[flags], "sample_indices": [sample], "stop_ids": stop_ids,
                          "mask_id": self.model.config.mask_token_id}  # fmt: skip

    def _stop_id(self, token: str | None) -> int | None:
        if token is None:
            return None
        ids = self.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(f"stop_token {token!r} is {len(ids)} tokens of this tokenizer: it must be one")
        return ids[0]
