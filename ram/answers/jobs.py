"""A file of answers before it is made: its models, prompts and settings, and the record of its inputs."""

import functools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ram.data import prompts
from ram.data.chat import ChatPrompt, ChatTemplate
from ram.data.text import spelling
from ram.data.tokenization import encode_prompts
from ram.decoding.par import MODEL_KEYS, PARParams
from ram.errors import UserError
from ram.log import log, pick_device, redacted
from ram.models import checkpoints, vocabulary
from ram.models.loaded import LoadedModels
from ram.settings.overrides import unread
from ram.storage.files import fingerprint
from ram.storage.provenance import Inputs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ram.settings.schema import SamplingSettings


@dataclass(frozen=True)
class Pair:
    """The models of one system, by path. One of the two paths may be None."""

    proposal: str | None
    aligner: str | None
    dtype: str = "auto"
    tokenizer_path: str | None = None

    @property
    def is_pair(self) -> bool:
        """Whether two models decode together."""
        return bool(self.proposal and self.aligner)

    def fingerprint(self, earlier: bool = False) -> list[str | None]:
        """Return the fingerprints of the proposal's and the aligner's weights, None for a missing model.

        Args:
            earlier: by the rule of earlier versions.
        """
        of = checkpoints.earlier_fingerprint if earlier else checkpoints.weights_fingerprint
        return [path and of(path) for path in (self.proposal, self.aligner)]

    def chat(self, template: str) -> ChatTemplate | None:
        """Return the models' own template if `template` is "chat", None if it is another.

        Raises:
            UserError: If the models have no chat template, or two.
        """
        if template != prompts.CHAT:
            return None
        tokenizer, _ = checkpoints.load_pair(self.proposal, self.aligner, self.tokenizer_path)
        for path in filter(None, (self.proposal, self.aligner)) if self.tokenizer_path is None else ():
            other = checkpoints.load_tokenizer(path).chat_template
            if other and tokenizer.chat_template and other != tokenizer.chat_template:
                raise UserError(
                    f"template=chat: {path} and {tokenizer.name_or_path} have different chat templates; "
                    "give the folder of the right one, sampling.tokenizer_path=FOLDER"
                )
            tokenizer.chat_template = tokenizer.chat_template or other
        return ChatTemplate(tokenizer)

    def law(self, params: PARParams, earlier: bool = False) -> dict[str, Any]:
        """Return the settings that decide the next-token distribution (the "law") of this pair.

        A single model reads only its own settings and a mode only some, so the others must not change the
        identity: they have their default here.

        Args:
            params: all settings.
            earlier: by the rule of earlier versions, which kept the settings of other modes.
        """
        values = params.identity()
        if self.is_pair:
            others = {key: getattr(PARParams, key) for key in unread(params.sample_mode)}
            return values if earlier else replace(params, **others).identity()
        prefix = "base_" if self.proposal else ""
        return {f"{prefix}{key}": values[f"{prefix}{key}"] for key in MODEL_KEYS}


@dataclass(frozen=True)
class AnswerJob:
    """A file of answers before it is made: everything that decides its contents.

    Args:
        label: Name of the job in the log and in errors.
        settings: The `sampling` keys of the configuration.
        records: Input rows. They are written back with their answers.
        prompts: One prompt per record.
        row_ids: One id per record. The random numbers of an answer depend only on `seed` and this id.
        add_bos: Whether prompts begin with BOS, unless the models' cards say otherwise.
        key: Key of the answer in each written row.
        extra: Further keys and values of each written row.
        cut_key: Key that a written row gets, with "length", if its answer was cut at the length limit.
        loaded: Keeps the models for the jobs that share it; None to load them for this job.
    """

    label: str
    pair: Pair
    params: PARParams
    settings: "SamplingSettings"
    records: list[dict[str, Any]]
    prompts: list[str]
    row_ids: list[int]
    seed: int
    add_bos: bool
    key: str
    extra: dict[str, Any]
    cut_key: str | None = None
    loaded: LoadedModels | None = field(default=None, compare=False, repr=False)

    @property
    def max_new_tokens(self) -> int:
        return self.settings.max_length - self.settings.max_prompt_length

    @property
    def has_template_stops(self) -> bool:
        """Whether the template's own stops end an answer, because `stop_str` is that of another template."""
        settings = self.settings
        is_ram = settings.template == prompts.TEMPLATE
        is_ram |= settings.multiround and settings.template != prompts.CHAT
        return settings.stop_str == prompts.STOP and not is_ram

    @property
    def stop(self) -> list[str]:
        """The strings that end an answer."""
        if self.has_template_stops:
            return prompts.template_stops(self.settings.template)
        return [self.settings.stop_str] if self.settings.stop_str else []

    def stops(self, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        """The strings that end an answer, and the template's stop tokens as strings.

        The end of the models' own template is EOS here (`encoded`), so its spelling may occur in an answer.
        """
        marks = spelling(tokenizer).marks
        ids = [] if self.settings.template == prompts.CHAT else self.stop_ids(tokenizer)
        return [*self.stop, *(marks[token] for token in ids)]

    def stop_ids(self, tokenizer: "PreTrainedTokenizerBase") -> list[int]:
        """The special tokens that end an answer beside the models' EOS: those of the template."""
        if self.prompts and isinstance(self.prompts[0], ChatPrompt):
            chat = self.prompts[0].chat
            return [] if chat.is_own_end else [chat.end_id]
        marks = spelling(tokenizer).marks
        return prompts.template_stop_ids(self.settings.template, marks) if self.has_template_stops else []

    @property
    def drafter(self) -> str | None:
        """Path of the model that drafts, None if the aligner does. It changes the speed, not the text."""
        if self.settings.drafter:
            return checkpoints.find_model(self.settings.drafter)
        return None

    def load(self) -> "tuple[PreTrainedModel | None, PreTrainedModel | None, PreTrainedModel | None]":
        """Load (proposal, aligner, drafter), each on its configured device; None for a missing model."""
        proposal_device = pick_device(self.settings.proposal_device)
        aligner_device = pick_device(self.settings.aligner_device)
        sources = {
            "proposal": (self.pair.proposal, proposal_device),
            "aligner": (self.pair.aligner, aligner_device),
            "drafter": (self.drafter, proposal_device if self.pair.proposal else aligner_device),
        }
        loaded = self.loaded or LoadedModels()
        models = loaded.load({k: (path, self.pair.dtype, at) for k, (path, at) in sources.items() if path})
        return models.get("proposal"), models.get("aligner"), models.get("drafter")

    @functools.cached_property
    def made_from(self) -> dict[str, Any]:
        """Everything that decides the answers. Equal for two jobs exactly if they give the same file."""
        return self._made_from()

    @functools.cached_property
    def earlier_made_from(self) -> dict[str, Any]:
        """What an earlier version recorded for the same answers."""
        return self._made_from(earlier=True)

    def _made_from(self, earlier: bool = False) -> dict[str, Any]:
        settings = self.settings
        proposal, aligner = self.pair.fingerprint(earlier)
        tokenizer = self.pair.tokenizer_path
        if tokenizer is not None and not earlier:
            tokenizer = checkpoints.tokenizer_fingerprint(tokenizer)
        models: dict[str, Any] = {"proposal": proposal, "aligner": aligner}
        if settings.backend == "endpoint":
            server = settings.endpoint
            models |= {
                "endpoint": server.model or list(map(redacted, server.urls)),
                "endpoint.send": server.send,
            }
        return {
            **models,
            **self.pair.law(self.params, earlier),
            "rows": self.rows_until(len(self.prompts)),
            "dtype": self.pair.dtype,
            "tokenizer_path": tokenizer,
            "seed": self.seed,
            "add_bos": self.add_bos,
            "max_length": settings.max_length,
            "max_prompt_length": settings.max_prompt_length,
            "stop_str": ["template", *self.stop] if self.has_template_stops else settings.stop_str,
            **({"marks": True} if self.has_marks else {}),
            "key": self.key,
            **self.extra,
        }

    def rows_until(self, count: int) -> str:
        """Return the fingerprint of the first `count` rows."""
        return fingerprint([self.records[:count], self.prompts[:count], self.row_ids[:count]])

    @functools.cached_property
    def row_keys(self) -> list[str]:
        """A digest of each row, as far as it decides the answer."""
        return [fingerprint(row)[:16] for row in zip(self.prompts, self.row_ids, strict=True)]

    @property
    def has_marks(self) -> bool:
        """Whether the template's special tokens may be part of the prompts."""
        return any(isinstance(prompt, prompts.Prompt) and prompt.has_marks for prompt in self.prompts)

    @property
    def identity(self) -> str:
        return fingerprint(self.made_from)

    @property
    def answer_identity(self) -> str:
        """Digest of everything that decides an answer besides its row."""
        return fingerprint(without_rows(self.made_from))

    def compare_templates(self) -> None:
        """Warn of each model that was trained with another template than it decodes with."""
        template = self.settings.template
        if self.settings.multiround and template != prompts.CHAT:
            template = prompts.TEMPLATE  # in which the records' dialogues are written
        for path in filter(None, (self.pair.proposal, self.pair.aligner)):
            trained = checkpoints.trained_template(path)
            if trained is not None and trained != template:
                log.warning(
                    f"{self.label}: {path} was trained with template={trained}, but decodes with "
                    f"template={template}; set template={trained}"
                )

    @functools.cached_property
    def encoded(self) -> "tuple[PreTrainedTokenizerBase, list[list[int]]]":
        """The tokenizer, and the token ids of every prompt.

        Raises:
            UserError: The models do not fit together, a prompt is empty, or one is too long to be cut.
        """
        pair, settings = self.pair, self.settings
        limit = settings.max_prompt_length
        tokenizer, card_add_bos = checkpoints.load_pair(
            pair.proposal, pair.aligner, pair.tokenizer_path, self.drafter
        )
        for path in (pair.proposal, pair.aligner, self.drafter):
            checkpoints.check_context(path, settings.max_length)
        if self.prompts and isinstance(self.prompts[0], ChatPrompt):
            tokenizer = self.prompts[0].chat.tokenizer  # the same, with the EOS of its chat template
        self.compare_templates()
        # The models' cards know how they were trained; the configuration decides only if there is no card.
        add_bos = self.add_bos if card_add_bos is None else card_add_bos
        if add_bos != self.add_bos:
            log.info(f"{self.label}: add_bos={str(add_bos).lower()}, as the models were trained")
        prompt_ids, n_cut = encode_prompts(tokenizer, self.prompts, limit, add_bos)
        for path in filter(None, (pair.proposal, pair.aligner)):
            used = [token for ids in prompt_ids for token in ids]
            vocabulary.check_ids(used, vocabulary.rows_in(path), path, f"a prompt of {self.label}")
        empty_rows = [row for row, ids in zip(self.row_ids, prompt_ids, strict=True) if not ids]
        if empty_rows:
            raise UserError(
                f"{self.label}: the prompt of row {empty_rows[0]} is empty; expected at least one token: "
                "fill in or remove the row"
            )
        can_cut = settings.template in (prompts.TEMPLATE, prompts.CHAT) or settings.multiround
        if n_cut and not can_cut:
            raise UserError(
                f"{self.label}: {n_cut} prompts are longer than max_prompt_length={limit}, and only prompts "
                f"of template {prompts.TEMPLATE!r} can be cut without losing a header: raise the length"
            )
        if n_cut:
            log.info(f"{self.label}: {n_cut} of {len(prompt_ids)} prompts cut to {limit} tokens")
        return tokenizer, prompt_ids


def without_rows(made_from: Inputs) -> Inputs:
    """Return the inputs of an answer other than its row."""
    if isinstance(made_from, str):
        return made_from
    return {key: value for key, value in made_from.items() if key != "rows"}
