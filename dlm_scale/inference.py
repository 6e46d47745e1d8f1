"""A checkpoint as something that predicts: what sampling and evaluation load. Needs nothing but the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dlm_scale.data.vocabulary import DELETE_TOKEN, GAP_TOKEN
from dlm_scale.errors import UsageError
from dlm_scale.parallel.mesh import Mesh
from dlm_scale.sampling.samplers import LEFT_TO_RIGHT


LANGUAGE_MODELS = ("masked", "autoregressive", "gaussian")  # the kinds of objective that make one


@dataclass(frozen=True)
class Conversations:
    """What a chat template makes of conversations: ids of the past of an answer, which ends with `end_id`."""

    template: str
    end_id: int
    _chat: Any

    def asked(self, question: str) -> Any:
        """int64 ids of a user's message, up to where the answer begins. Raises UsageError."""
        return self._chat.prompt([("user", question)])

    def next_answer(self, messages: list) -> Any:
        """The same of a conversation, a list of {role, content}."""
        from dlm_scale.data.chat import messages_of

        return self._chat.prompt(messages_of(messages, lambda: "messages"), "messages")


@dataclass(frozen=True)
class Inference:
    """A model on one device with its tokenizer (None for a run on synthetic data)."""

    model: Any
    config: Any
    tokenizer_meta: Any
    tokenizer: Any
    device: Any
    checkpoint: Any
    weights: str  # "ema" or "param": which weights were loaded

    @property
    def vocabulary(self) -> Any:
        return self.tokenizer_meta.vocabulary

    @property
    def seq_len(self) -> int:
        return self.config.model.seq_len

    @property
    def step(self) -> int:
        return self.checkpoint.state["step"]

    default_num_steps = 128

    @property
    def kind(self) -> str:
        """`objective.kind`: `masked`, `autoregressive`, `gaussian`, or that of a head for replaced tokens."""
        return self.config.objective.kind

    @property
    def default_sampler(self) -> str:
        return {"autoregressive": LEFT_TO_RIGHT, "gaussian": "ddim"}.get(self.kind, "ancestral")

    @property
    def is_autoregressive(self) -> bool:
        return self.kind == "autoregressive"

    @property
    def is_gaussian(self) -> bool:
        return self.kind == "gaussian"

    @property
    def edit_ids(self) -> dict[str, int]:
        """Ids of the answers that an editing sampler acts on, `delete` and `gap`, of those that were learnt.

        Raises UsageError where visible tokens were not trained on: their predictions mean nothing.
        """
        diffusion, train = self.config.diffusion, self.config.train
        if self.step <= diffusion.edit_stage_start * train.num_steps:
            start = f"step {self.step} of {train.num_steps}, diffusion.edit_stage_start = {diffusion.edit_stage_start:g}"
            raise UsageError(f"{self.checkpoint.path} has no edit stage behind it ({start}): what it predicts at visible "
                             "tokens is untrained. Sample without --allow_edits and the samplers edit and edit_gated, "
                             "or train with diffusion.edit_stage_start below 1")
        names = {"delete": DELETE_TOKEN} if diffusion.insertion_corruption else {}
        names |= {"gap": GAP_TOKEN} if diffusion.deletion_corruption else {}
        return {name: self.tokenizer.special_ids[token] for name, token in names.items()}

    @property
    def predict(self) -> Any:
        """predict(x_BL, rows_N, attention=None, cache=None) -> log-probabilities [N, V] float32 of the clean ids at flat
        positions (docs/design.md, signature 3), with `critique` and `local` (sampling/predict.py).

        Raises UsageError where an autoregressive checkpoint is asked for a position behind a mask, and for a Gaussian
        one, which reads vectors.
        """
        if self.is_gaussian:
            raise UsageError(f"{self.checkpoint.path} is gaussian: it reads token vectors and knows no masks; sample it "
                             "with --sampler ddim or ddpm, or take a masked checkpoint")
        from dlm_scale.sampling.predict import Predict

        return Predict(self._read, self.model.head)

    def _read(self, x_BL, rows_N, readout, attention=None, cache=None):
        import torch

        from dlm_scale.ops import segment_means

        x_BL, rows_N = x_BL.to(self.device), rows_N.to(self.device)
        is_masked_BL = x_BL == self.vocabulary.mask_id
        m_B = segment_means(is_masked_BL.float(), attention)
        if self.is_autoregressive:
            if cache is not None:
                raise UsageError("kept keys and values are for masked checkpoints, and this one is autoregressive")
            self._check_left_context(rows_N, is_masked_BL, attention)
            x_BL, attention = self.network_input(x_BL)
        with torch.no_grad():
            return self.model(x_BL, m_B=m_B, rows_N=rows_N, readout=readout, attention=attention, cache=cache)

    def denoise(self, z_BLE, step: int, guess_BLE, temperature: float = 1.0):
        """(x0 float32 [B, L, E], ids [B, L]) of a Gaussian checkpoint: its prediction of the clean vectors from those
        at `step` of 1 ... T and from an earlier prediction (zeros: none), and the token that stands for each.

        temperature, of x0_softmax: 0 takes the likeliest token's vector (Diffusion-LM's clamping). What v and eps predict
        is kept within the ball of the vectors where these have length 1: near t = 1 an error of eps is divided by ~0.
        """
        import torch

        from dlm_scale.diffusion.gaussian import Latent

        process, (num_rows, length, dim) = self.process, z_BLE.shape
        alpha, sigma = process.scales(torch.tensor(step, device=z_BLE.device), z_BLE)

        def readout(head):
            if process.prediction != "x0_softmax":
                x0_NE = process.x0(z_BLE.flatten(0, 1), head.output(), alpha, sigma)
                if self.config.gaussian.embeddings != "free":
                    x0_NE = x0_NE / x0_NE.norm(dim=-1, keepdim=True).clamp(min=1)
                return x0_NE, head.nearest_ids(x0_NE)
            return head.mean(max(temperature, 1e-4)), head.best_ids()

        nothing_BL = torch.zeros(num_rows, length, dtype=torch.long, device=z_BLE.device)
        t_B = torch.full((num_rows,), step / process.num_steps, device=z_BLE.device)
        latent = Latent(vectors_BLE=z_BLE, guess_BLE=guess_BLE)
        with torch.no_grad():
            x0_NE, ids_N = self.model(
                nothing_BL, m_B=t_B, rows_N=torch.arange(num_rows * length, device=z_BLE.device), readout=readout,
                latent=latent,
            )  # fmt: skip
        return x0_NE.view(num_rows, length, dim), ids_N.view(num_rows, length)

    @property
    def process(self):
        """The forward process of a Gaussian checkpoint."""
        from dlm_scale.engine.objectives import process_of

        return process_of(self.config.gaussian)

    def token_vectors(self, ids_BL):
        """Float32 [B, L, E]: the vectors of tokens, of a Gaussian checkpoint."""
        import torch

        from dlm_scale.model.latent import vectors_of

        with torch.no_grad():
            return vectors_of(self.model.embedding(ids_BL.to(self.device)), self.config.gaussian.embeddings)

    def generate(self, prompts: Sequence[str], *, num_samples: int = 1, is_infill: bool = False, **options) -> list:
        """`num_samples` Samples (text, ids, nfe) of each prompt, or with is_infill of each text with <mask> holes.

        options: sampler, steps, max_new_tokens, seed, temperature, top_k, top_p, stop_token (a list), chat and so on,
        named and meant as the flags of `dlm sample`, whose texts these are. Raises UsageError.
        """
        from dlm_scale.sampling.texts import generate_texts

        return generate_texts(self, prompts, num_samples, is_infill, options)

    def chat(self, template: str) -> Conversations:
        """Conversations by a template: `chatml`, or a Jinja file. Raises UsageError where this tokenizer cannot write it."""
        from dlm_scale.data.chat import Chat, check_template, end_id_of, template_of

        special_ids = {} if self.tokenizer is None else self.tokenizer.special_ids
        if not special_ids:
            raise UsageError(f"--chat: {self.checkpoint.path} has no special tokens, so it was not trained on conversations:"
                             " sample it with plain prompts, or train it on what `dlm prepare --chat` makes")  # fmt: skip
        text = check_template(template_of(template), special_ids)
        return Conversations(text, end_id_of(text, special_ids), Chat(text, special_ids, self.tokenizer.encode))

    def stream(self, prompt: str, *, num_samples: int = 1, is_infill: bool = False, **options) -> Iterator:
        """The State of all samples of one prompt (sampling/engine.py) at the start and after every pass."""
        from dlm_scale.sampling.texts import stream_text

        return stream_text(self, prompt, range(num_samples), is_infill, options)

    def network_input(self, x_BL) -> tuple:
        """What the network reads where x_BL is to be predicted, and with which mask value (None: the network's own)."""
        from dlm_scale.diffusion.autoregressive import moved_right
        from dlm_scale.ops import Causal

        return (moved_right(x_BL, self.vocabulary.mask_id), Causal()) if self.is_autoregressive else (x_BL, None)

    def _check_left_context(self, rows_N, is_masked_BL, attention) -> None:
        num_masked_before_BL = is_masked_BL.cumsum(1) - is_masked_BL.long()
        if attention is not None or bool((num_masked_before_BL.flatten()[rows_N] > 0).any()):
            raise UsageError(f"{self.checkpoint.path} is autoregressive: it predicts a token from all those before it, "
                             f"so it can only fill from left to right, by the sampler {LEFT_TO_RIGHT}; or take a masked "
                             "checkpoint")


def load_for_inference(
    path: str | Path, device: str = "auto", use_ema: bool = True, local_rank: int = 0, mesh: Mesh = Mesh()
) -> Inference:
    """Load a run folder's last good checkpoint, or one checkpoint folder, onto the GPU of `local_rank` or a CPU.

    With a mesh of tensor size > 1 each rank of a tensor-parallel group holds its part of the model, whatever layout
    trained it, and all of them must predict together.

    Raises:
        UsageError: no checkpoint there, a damaged one, one of another format, of a shape that the mesh cannot split, or
            of another kind than a language model.
    """
    from dlm_scale.checkpoint.folders import find_checkpoint
    from dlm_scale.checkpoint.reader import open_checkpoint
    from dlm_scale.config import config_from_text
    from dlm_scale.engine.runtime import pick_device

    folder, _ = find_checkpoint(Path(path))
    checkpoint = open_checkpoint(folder, verify=False)  # find_checkpoint has just hashed it
    text, size = checkpoint.document("config.yaml").decode(), mesh.tensor_size
    sections = {"parallel": {"tensor_parallel_size": size}} if size > 1 else None
    config = config_from_text(text, f"{folder}/config.yaml", sections)
    if config.objective.kind not in LANGUAGE_MODELS:
        raise UsageError(f"{folder} is no language model (its objective.kind is {config.objective.kind}): it has no "
                         "NELBO and writes no text; its figures stand in the metrics.jsonl of its run, and a sequence "
                         "scorer can be an objective.judge")
    meta = _tokenizer_meta(checkpoint)
    tokenizer = None if meta.tokenizer.kind == "none" else _tokenizer(folder, meta)
    place = pick_device(device, local_rank)
    weights = "ema" if use_ema and ("embedding.weight", "ema") in checkpoint.tensors else "param"
    model = load_model(checkpoint, config, meta.vocabulary, place, weights, mesh)
    return Inference(model, config, meta, tokenizer, place, checkpoint, weights)


def _tokenizer_meta(checkpoint: Any):
    from dlm_scale.data.meta import TOKENIZER_DOCUMENT, TokenizerMeta, parse

    raw = json.loads(checkpoint.document(TOKENIZER_DOCUMENT))
    return parse(TokenizerMeta, raw, f"{checkpoint.path}/{TOKENIZER_DOCUMENT}")


def _tokenizer(folder: Path, meta: Any):
    from dlm_scale.data.tokenizer import load_tokenizer

    return load_tokenizer(folder, meta)


def load_model(checkpoint: Any, config: Any, vocabulary: Any, device: Any, slot: str, mesh: Mesh):
    """This rank's part of a model with the weights of `slot`, one parameter in memory at a time beside it."""
    import torch

    from dlm_scale.model.parameters import parameter_table
    from dlm_scale.model.sharding import local_boxes, split_range
    from dlm_scale.model.transformer import Transformer
    from dlm_scale.parallel.layers import layers_of

    table = parameter_table(config.model, vocabulary)
    _check_tensors(checkpoint, table, slot)
    dtype = torch.bfloat16 if config.train.precision == "bf16" and device.type == "cuda" else torch.float32
    layers = layers_of(mesh, sequence_parallel=False)
    with torch.device(device):
        model = Transformer(config.model, vocabulary, layers).to(device, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spec, local_N, done = table[name], parameter.view(-1), 0
            boxes = local_boxes(spec, mesh.tensor_rank, mesh.tensor_size, parameter.shape[0])
            for item, low, high in split_range(boxes, 0, len(local_N)):
                values = checkpoint.read_flat(name, slot, item.box, low, high - low, view=spec.view)
                local_N[done : done + high - low].copy_(values)
                done += high - low
            local_N[done:].zero_()  # padded rows
    return model.eval()


def _check_tensors(checkpoint: Any, table: dict, slot: str) -> None:
    for name, spec in table.items():
        stored = checkpoint.tensors.get((name, slot))
        if stored is None or tuple(stored.shape) != spec.shape:
            found = "is missing" if stored is None else f"has shape {tuple(stored.shape)}, not {spec.shape}"
            raise UsageError(f"{checkpoint.path}: tensor {name} ({slot}) {found}: config.yaml and weights of this "
                             "checkpoint do not belong together; take another checkpoint")
