"""The models of a server: one frozen proposal, named aligners, and the engine that decodes with them.

    messages or text -> prompt ids, as in training -> Request, one per answer -> EngineThread

Aligners are added and removed while the server answers. Each one is checked against the proposal before its
weights are read.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ram.data import prompts
from ram.data.chat import ChatTemplate
from ram.data.text import spelling
from ram.data.tokenization import begin, encode
from ram.decoding.par import MODEL_KEYS, PARParams, untempered
from ram.decoding.requests import BadRequest, Request, TooLong, UnknownAligner
from ram.decoding.scoring import RAW
from ram.errors import UserError
from ram.log import log, pick_device
from ram.models import checkpoints, run_folder
from ram.models.abilities import max_positions
from ram.serving import bounds
from ram.serving.fastchat.stream import request_params
from ram.serving.loop import EngineThread
from ram.settings import serving
from ram.settings.serving import PROPOSAL, Settings
from ram.storage.files import fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Served:
    """A model name of the HTTP API: the proposal alone, or the pair of the proposal and one aligner.

    Attributes:
        name: the name in requests.
        aligner: the aligner's name in the engine; None for the proposal alone.
        path: folder of the aligner, or of the proposal if it is served alone.
        add_bos: begin each prompt with the BOS token.
        fingerprint: digest of the weights of all models involved.
        created: when the model was loaded, in seconds since 1970.
        template: FastChat conversation template of its dialogues, or "chat" for the models' own.
        chat: the models' own template, None for another one.
        stops: strings that end an answer.
        stop_ids: special tokens that end an answer.
        ends: EOS of the models' own template.
    """

    name: str
    aligner: str | None
    path: str
    add_bos: bool
    fingerprint: str
    created: int
    template: str
    chat: ChatTemplate | None
    stops: list[str]
    stop_ids: list[int]
    ends: tuple[int, ...]

    def render(self, turns: Sequence[tuple[bool, str]], system: str | None) -> str:
        """Return the prompt of a dialogue, see `prompts.render_dialogue`."""
        if self.chat is not None:
            return self.chat.render(turns, system)
        return prompts.render_dialogue(turns, self.template, system)


class Models:
    """A proposal, its aligners and their engine.

    Raises:
        UserError: A folder cannot be served. Most faults are reported before any weights are read.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, config = settings, settings.config
        checkpoints.remote_code["trust_remote_code"] = config.trust_remote_code
        self.proposal = run_folder.find_served(config.proposal)
        self.lock = threading.Lock()  # of the tokenizer, which is not safe to use from two threads at once
        self.tokenizer, proposal_add_bos = checkpoints.load_pair(self.proposal, None)
        paths = {name: run_folder.find_served(path) for name, path in settings.aligners.items()}
        add_bos = {name: self._check(path) for name, path in paths.items()}
        trained = map(checkpoints.trained_template, (self.proposal, *paths.values()))
        # Of a model without a card, such as a downloaded proposal; a card names that of its training.
        self.template = config.template or next(filter(None, trained), prompts.TEMPLATE)
        templates = {path: self._template(path) for path in (self.proposal, *paths.values())}
        devices = [pick_device(name) for name in (config.proposal_device, config.aligner_device)]
        self.device = devices[1]
        model = checkpoints.load_model(self.proposal, config.dtype, devices[0])
        # The first call initialises the tokenizer, which must not happen in two threads at once.
        encode(self.tokenizer, ["a"])
        aligners = {name: self._load(path) for name, path in paths.items()}
        limits = [positions(one_model) for one_model in (model, *aligners.values())]
        self.max_length = config.limits.max_length or min([*limits, config.engine.max_tokens])
        self.usual = min(config.max_new_tokens, self.max_length // 2)  # default answer length, in tokens
        self.served: dict[str, Served] = {}  # replaced, never changed: other threads may be reading it
        self._add(PROPOSAL, None, self.proposal, proposal_add_bos, templates[self.proposal])
        for name, path in paths.items():
            self._check_length(aligners[name], path)
            self._add(name, name, path, add_bos[name], templates[path])
        self._check_length(model, self.proposal)
        try:
            self.engine = EngineThread(model, self.tokenizer, aligners, **vars(config.engine))
        except ValueError as error:
            raise UserError(str(error)) from None

    def _check(self, path: str) -> bool | None:
        """Return an aligner's `add_bos`.

        Raises:
            UserError: Its tokenizer differs from the proposal's.
        """
        return checkpoints.load_pair(self.proposal, path)[1]

    def _template(self, path: str) -> tuple[str, ChatTemplate | None]:
        """Return the template of an aligner or the proposal; reads no weights.

        Raises:
            UserError: It is unknown, or the models' own, and they have none.
        """
        trained = checkpoints.trained_template(path)
        template = self.settings.config.template or trained or self.template
        if trained and trained != template:
            log.warning(f"{path} was trained with template={trained}, but is served with {template}")
        if template != prompts.CHAT:
            prompts.conversation_template(template)  # refuses an unknown one
            return template, None
        tokenizers = [checkpoints.load_tokenizer(source) for source in (path, self.proposal)]
        return template, ChatTemplate(next((t for t in tokenizers if t.chat_template), tokenizers[0]))

    def _load(self, path: str) -> "PreTrainedModel":
        return checkpoints.load_model(path, self.settings.config.dtype, self.device)

    def _check_length(self, model: "PreTrainedModel", path: str) -> None:
        if positions(model) < self.max_length:
            raise UserError(
                f"{path} holds {positions(model)} positions, fewer than limits.max_length={self.max_length}"
            )

    def _add(
        self,
        name: str,
        aligner: str | None,
        path: str,
        trained_add_bos: bool | None,
        rendering: tuple[str, ChatTemplate | None],
    ) -> None:
        """Serve a model under a name; `add_bos` in the settings overrides that of its training."""
        configured_add_bos = self.settings.config.add_bos
        paths = [self.proposal] if aligner is None else [self.proposal, path]
        weights = fingerprint([checkpoints.weights_fingerprint(folder) for folder in paths])[:12]
        add_bos = bool(trained_add_bos if configured_add_bos is None else configured_add_bos)
        template, chat = rendering
        stop_ids = prompts.template_stop_ids(template, spelling(self.tokenizer).marks)
        served = Served(
            name,
            aligner,
            path,
            add_bos,
            f"fp_{weights}",
            int(time.time()),
            template,
            chat,
            stops=prompts.template_stops(template),
            stop_ids=stop_ids,
            ends=(chat.end_id,) if chat else (),
        )
        self.served = {**self.served, name: served}

    # ---- adding and removing aligners ----------------------------------------------------------------------

    def add_aligner(self, name: str, path: str) -> Served:
        """Load an aligner from a folder below `aligner_root` and serve it from now on.

        If another aligner has this name, it is replaced. Only one thread may call this at a time.

        Raises:
            UserError: The aligner cannot be served. Nothing has changed.
        """
        config = self.settings.config
        if not config.aligner_root:
            raise UserError("aligner_root is not set: this server loads no further aligners")
        serving.check_name(name)
        if name not in self.served and len(self.served) > config.limits.aligners:
            raise UserError(f"{config.limits.aligners} aligners are loaded: remove one first")
        root = Path(config.aligner_root).resolve()
        if "\0" in path or not (folder := (root / path).resolve()).is_relative_to(root):
            raise UserError(f"{path!r} does not lie below aligner_root")
        source = checkpoints.find_model(str(folder))
        add_bos = self._check(source)
        rendering = self._template(source)
        model = self._load(source)
        self._check_length(model, source)
        try:
            self.engine.add_aligner(name, model)
        except ValueError as error:
            raise UserError(str(error)) from None
        self._add(name, name, source, add_bos, rendering)
        log.info(f"aligner {name}: loaded from {source}")
        return self.served[name]

    def remove_aligner(self, name: str) -> None:
        """Stop serving an aligner; its running requests are finished.

        Raises:
            UnknownAligner: No aligner has this name.
        """
        if name == PROPOSAL or name not in self.served:
            raise UnknownAligner(f"no aligner {name!r} is loaded")
        self.served = {key: served for key, served in self.served.items() if key != name}
        self.engine.remove_aligner(name)
        log.info(f"aligner {name}: removed")

    def find(self, name: str) -> Served:
        """Return the model that is served under a name.

        Raises:
            UnknownAligner: No model has this name.
        """
        if (served := self.served.get(name)) is None:
            raise UnknownAligner(f"no model {name[:64]!r}; there are: {', '.join(sorted(self.served))}")
        return served

    # ---- requests ------------------------------------------------------------------------------------------

    def law(self, request: dict[str, Any]) -> PARParams:
        """Return the server's next-token settings with those of a request.

        Raises:
            BadRequest: A setting is out of bounds.
        """
        bounds.check_law(request)
        try:
            return request_params(self.settings.params, request)
        except ValueError as error:
            raise BadRequest(str(error)) from None

    def defaults(self) -> dict[str, Any]:
        """Return the settings of a request that gives none, by their names in `/v1/chat/completions`."""
        law = {key: getattr(self.settings.params, key) for key in PARParams.field_names()}
        return {"max_tokens": self.usual, "seed": self.settings.config.seed} | law

    def scoring_law(self, request: dict[str, Any]) -> PARParams:
        """Return the settings under which a request's prompt is scored.

        They are temperature 1, no nucleus and no penalty, unless the request sets these keys. Temperature 0
        and `greedy` are for new tokens only: with them no other token has a probability.

        Raises:
            BadRequest: A setting is out of bounds.
        """
        keys = [f"{prefix}{key}" for prefix in ("", "base_") for key in MODEL_KEYS]
        return untempered(self.law({key: getattr(RAW, key) for key in keys} | request))

    def new_tokens(self, max_tokens: int | None) -> int:
        """Return a request's limit on the answer, in tokens; None gives the default.

        Raises:
            TooLong: The limit leaves no room for a prompt.
        """
        new = self.usual if max_tokens is None else max_tokens
        if new >= self.max_length:
            raise TooLong(f"max_tokens={new}: expected less than {self.max_length}, which the prompt shares")
        return new

    def encode_dialogue(
        self, served: Served, turns: Sequence[tuple[bool, str]], system: str | None, new_tokens: int
    ) -> list[int]:
        """Return the ids of a dialogue without its oldest turns, if they leave no room for `new_tokens`.

        The system message and the last message of the user always stay.

        Args:
            served: the model, in whose template the dialogue is rendered.
            turns: as in `prompts.render_dialogue`.

        Raises:
            BadRequest: The models' own template cannot render it.
            TooLong: What stays does not fit.
        """
        starts = [index for index, (user, _) in enumerate(turns) if user or not index] or [0]

        def rest(start: int) -> str:
            return served.render(turns[starts[start] :], system)

        try:
            return self.encode_rest(rest, len(starts), new_tokens, served.add_bos)
        except UserError as error:
            raise BadRequest(str(error)) from None

    def encode_rendered(self, text: str, new_tokens: int, add_bos: bool) -> list[int]:
        """Return the ids of a dialogue that is rendered in this project's template, as `encode_dialogue`."""
        system, *turns = prompts.split_turns(text)
        return self.encode_rest(
            lambda start: system + "".join(turns[start:]), max(len(turns), 1), new_tokens, add_bos
        )

    def encode_rest(
        self, rest: Callable[[int], str], n_starts: int, new_tokens: int, add_bos: bool
    ) -> list[int]:
        """Return the ids of the longest rest of a dialogue that leaves room for `new_tokens`.

        Args:
            rest: The dialogue from its i-th possible start; 0 is the whole one.

        Raises:
            TooLong: Not even the shortest one fits.
        """
        room = self.max_length - new_tokens

        def ids_from(start: int) -> list[int] | None:
            try:
                ids = self.encode_text(rest(start), add_bos, room)
            except TooLong:
                return None
            return ids if len(ids) <= room else None

        best = ids_from(0)
        first, last = 1, n_starts if best is None else 0  # the first start that fits is one of these, or none
        while first < last:
            middle = (first + last) // 2
            if (ids := ids_from(middle)) is None:
                first = middle + 1
            else:
                best, last = ids, middle
        if best is not None:
            return best
        raise TooLong(
            f"the last message does not fit: there is room for {room} tokens beside the answer's {new_tokens}"
        )

    def encode_text(self, text: str, add_bos: bool, room: int | None = None) -> list[int]:
        """Return the ids of a text, which is not cut.

        Raises:
            TooLong: It has so many characters that it cannot fit into the context, or into `room` tokens.
        """
        bounds.check_text(text, self.max_length if room is None else room)
        with self.lock:
            ids = encode(self.tokenizer, [text])[0]
        if not add_bos:
            return ids
        bos = self.tokenizer.bos_token_id
        assert isinstance(bos, int), "add_bos needs a tokenizer with a BOS token"
        return begin(text, ids, bos)

    def requests(
        self,
        served: Served,
        prompt_ids: Sequence[Sequence[int]],
        params: PARParams,
        new_tokens: int | None,
        seed: int,
        stop: Sequence[str],
        n: int = 1,
        logprobs: int | None = None,
        stop_token_ids: Sequence[int] = (),
        continued: bool = False,
        client: str = "",
    ) -> list[Request]:
        """Return one request per answer; the n answers to a prompt have the row ids 0 to n - 1.

        Args:
            new_tokens: limit on each answer. None gives the default length, reduced to the room that the
                prompt leaves.

        Raises:
            BadRequest: The request asks for too much.
            TooLong: A prompt and its answer do not fit into the context.
        """
        limits = self.settings.config.limits
        bounds.check_answers(n * len(prompt_ids), stop, stop_token_ids, logprobs, seed, limits)
        requests = []
        for ids in prompt_ids:
            room = self.max_length - len(ids)
            new = min(self.usual, room) if new_tokens is None else new_tokens
            if new > room or (new < 1 and new_tokens != 0):
                raise TooLong(
                    f"a prompt of {len(ids)} tokens and an answer of {max(new, 1)} are more than the "
                    f"{self.max_length} that this server holds"
                )
            request = Request(
                tuple(ids),
                served.aligner,
                params,
                max_new_tokens=new,
                seed=seed,
                stop=tuple(stop),
                logprobs=logprobs,
                stop_token_ids=tuple(stop_token_ids),
                ends=served.ends,
                continued=continued,
                client=client,
            )
            requests += [replace(request, row_id=row) for row in range(n)]
        return requests


def positions(model: "PreTrainedModel") -> int:
    """Return the longest context of a model; a very large number if its configuration sets none."""
    return max_positions(model.config) or 1 << 31
