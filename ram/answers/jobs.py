"""What is decoded, with which settings, and what a file of answers is made from."""

import functools
from dataclasses import asdict, dataclass
from typing import Any

from ram.data import prompts
from ram.data.tokenization import encode_prompts
from ram.decoding.par import PARParams
from ram.errors import UserError
from ram.log import log, pick_device
from ram.models import checkpoints
from ram.storage.files import fingerprint


@dataclass(frozen=True)
class Pair:
    """The models of one system by where they lie; either may be None."""

    proposal: str | None
    aligner: str | None
    dtype: str = "auto"
    tokenizer_path: str | None = None

    def fingerprint(self) -> list[str | None]:
        return [path and checkpoints.weights_fingerprint(path) for path in (self.proposal, self.aligner)]

    def law(self, params: PARParams) -> dict[str, Any]:
        """The settings that this pair's law reads: one model alone reads only its own."""
        found = asdict(params)
        if self.proposal and self.aligner:
            return found
        prefix = "base_" if self.proposal else ""
        keys = ("temperature", "top_p", "top_k", "repetition_penalty")
        return {f"{prefix}{key}": found[f"{prefix}{key}"] for key in keys}


@dataclass(frozen=True)
class Job:
    """A file of answers before it is made: everything that decides them.

    records: the input rows, written back beside the answers, which go under `key`; extra: what else each
    written row gets. settings: the `sampling` keys. label: for the log.
    """

    label: str
    pair: Pair
    params: PARParams
    settings: Any
    records: list[dict[str, Any]]
    prompts: list[str]
    row_ids: list[int]
    seed: int
    add_bos: bool
    key: str
    extra: dict[str, Any]

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_length - self.settings.max_prompt_length

    @property
    def drafter(self) -> str | None:
        """The small model that drafts where one model decodes alone; it changes no text."""
        alone = self.pair.proposal is None or self.pair.aligner is None
        return checkpoints.find_model(self.settings.drafter) if alone and self.settings.drafter else None

    def load(self):
        """(proposal, aligner, drafter), each on the device that the settings give it, or None."""
        devices = (self.settings.proposal_device, self.settings.aligner_device)
        devices = [pick_device(device) for device in devices]
        devices.append(devices[0] if self.pair.proposal else devices[1])
        paths = (self.pair.proposal, self.pair.aligner, self.drafter)
        return tuple(
            path and checkpoints.load_model(path, self.pair.dtype, device)
            for path, device in zip(paths, devices, strict=True)
        )

    @property
    def stop(self) -> list[str]:
        return [self.settings.stop_str] if self.settings.stop_str else []

    @functools.cached_property
    def made_from(self) -> dict[str, Any]:
        """Everything that decides the answers; equal exactly where two jobs give the same file."""
        pair, settings = self.pair, self.settings
        weights = dict(zip(("proposal", "aligner"), pair.fingerprint(), strict=True))
        if settings.backend == "endpoint":
            server = settings.endpoint
            weights |= {"endpoint": server.model or list(server.urls), "endpoint.send": server.send}
        return {
            **weights,
            **pair.law(self.params),
            "rows": fingerprint([self.records, self.prompts, self.row_ids]),
            "dtype": pair.dtype,
            "tokenizer_path": pair.tokenizer_path,
            "seed": self.seed,
            "add_bos": self.add_bos,
            "max_length": settings.max_length,
            "max_prompt_length": settings.max_prompt_length,
            "stop_str": settings.stop_str,
            "key": self.key,
            **self.extra,
        }

    @property
    def identity(self) -> str:
        return fingerprint(self.made_from)

    @functools.cached_property
    def encoded(self):
        """The tokenizer and all prompts as ids; raises UserError where the pair does not fit together."""
        tokenizer, trained_bos = checkpoints.load_pair(
            self.pair.proposal, self.pair.aligner, self.pair.tokenizer_path, self.drafter
        )
        for path in (self.pair.proposal, self.pair.aligner, self.drafter):
            checkpoints.check_context(path, self.settings.max_length)
        add_bos = self.add_bos if trained_bos is None else trained_bos
        if add_bos != self.add_bos:
            log.info(f"{self.label}: add_bos={str(add_bos).lower()}, as the models were trained")
        ids, cut = encode_prompts(tokenizer, self.prompts, self.settings.max_prompt_length, add_bos)
        if empty := [row for row, given in zip(self.row_ids, ids, strict=True) if not given]:
            raise UserError(
                f"{self.label}: the prompt of row {empty[0]} is empty; a model needs a first token"
            )
        settings = self.settings
        if cut and settings.template != prompts.TEMPLATE and not settings.multiround:
            raise UserError(
                f"{self.label}: {cut} prompts are longer than "
                f"max_prompt_length={settings.max_prompt_length}, and only "
                f"those of template {prompts.TEMPLATE!r} can be cut without losing a header: raise the length"
            )
        if cut:
            log.info(
                f"{self.label}: {cut} of {len(ids)} prompts cut to {self.settings.max_prompt_length} tokens"
            )
        return tokenizer, ids
