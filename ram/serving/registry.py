"""What a server holds: one frozen proposal, any number of aligners by name, the engine that decodes for all.

    messages or text -> prompt ids, as in training -> Request, one per answer -> EngineThread

Aligners come and go while others answer; every one is checked against the proposal before its weights are
read.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ram.data import prompts
from ram.data.tokenization import encode, encode_prompts
from ram.decoding.par import PARParams
from ram.decoding.requests import BadRequest, Request, TooLong, UnknownAligner
from ram.errors import UserError
from ram.log import log, pick_device
from ram.models import checkpoints
from ram.serving.fastchat.stream import request_params
from ram.serving.loop import EngineThread
from ram.settings import serving
from ram.settings.serving import PROPOSAL, Settings
from ram.storage.files import fingerprint

MOST_CUT = 8  # a dialogue may be so many times longer than what fits; cutting a longer one costs too much


@dataclass(frozen=True)
class Served:
    """A name over HTTP: the proposal, or the pair of it and an aligner."""

    name: str
    aligner: str | None  # its name in the engine, None for the proposal alone
    path: str
    add_bos: bool
    fingerprint: str  # of both models' weights
    created: int  # seconds since 1970


class Models:
    """A proposal, its aligners and their engine.

    Raises UserError for folders that cannot be served, before weights are read where that is possible.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings, config = settings, settings.config
        checkpoints.remote_code["trust_remote_code"] = config.trust_remote_code
        self.proposal = checkpoints.find_model(config.proposal)
        self.template_stops = prompts.template_stops(config.template)
        self.lock = threading.Lock()  # of the tokenizer, which forgets who asked first
        self.tokenizer, own = checkpoints.load_pair(self.proposal, None)
        found = {name: checkpoints.find_model(path) for name, path in settings.aligners.items()}
        bos = {name: self._check(path) for name, path in found.items()}
        devices = [pick_device(name) for name in (config.proposal_device, config.aligner_device)]
        self.device = devices[1]
        model = checkpoints.load_model(self.proposal, config.dtype, devices[0])
        encode(self.tokenizer, ["a"])  # its first call sets it up, which must not happen in two threads
        aligners = {name: self._load(path) for name, path in found.items()}
        limits = [positions(each) for each in (model, *aligners.values())]
        self.max_length = config.limits.max_length or min([*limits, config.engine.max_tokens])
        self.usual = min(config.max_new_tokens, self.max_length // 2)  # tokens of an answer
        self.served: dict[str, Served] = {}  # replaced, never changed: other threads may be reading it
        self._add(PROPOSAL, None, self.proposal, own)
        for name, path in found.items():
            self._check_length(aligners[name], path)
            self._add(name, name, path, bos[name])
        self._check_length(model, self.proposal)
        try:
            self.engine = EngineThread(model, self.tokenizer, aligners, **vars(config.engine))
        except ValueError as error:
            raise UserError(str(error)) from None

    def _check(self, path: str) -> bool | None:
        """An aligner's `add_bos`; raises UserError where its tokenizer is not the proposal's."""
        return checkpoints.load_pair(self.proposal, path)[1]

    def _load(self, path: str):
        return checkpoints.load_model(path, self.settings.config.dtype, self.device)

    def _check_length(self, model, path: str) -> None:
        if positions(model) < self.max_length:
            raise UserError(
                f"{path} holds {positions(model)} positions, fewer than limits.max_length={self.max_length}"
            )

    def _add(self, name: str, aligner: str | None, path: str, bos: bool | None) -> None:
        given = self.settings.config.add_bos
        paths = [self.proposal] if aligner is None else [self.proposal, path]
        weights = fingerprint([checkpoints.weights_fingerprint(each) for each in paths])[:12]
        add_bos = bool(bos if given is None else given)
        found = Served(name, aligner, path, add_bos, f"fp_{weights}", int(time.time()))
        self.served = {**self.served, name: found}

    # ---- aligners that come and go -------------------------------------------------------------------------

    def add_aligner(self, name: str, path: str) -> Served:
        """Loads an aligner from a folder below `aligner_root` and serves it from now on, also where another
        one has the name; raises UserError, and changes nothing, where that fails. For one thread at a time.
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
        bos = self._check(source)
        model = self._load(source)
        self._check_length(model, source)
        try:
            self.engine.add_aligner(name, model)
        except ValueError as error:
            raise UserError(str(error)) from None
        self._add(name, name, source, bos)
        log.info(f"aligner {name}: loaded from {source}")
        return self.served[name]

    def remove_aligner(self, name: str) -> None:
        """Serves an aligner no longer; what it is answering it finishes. Raises UnknownAligner."""
        if name == PROPOSAL or name not in self.served:
            raise UnknownAligner(f"no aligner {name!r} is loaded")
        self.served = {key: served for key, served in self.served.items() if key != name}
        self.engine.remove_aligner(name)
        log.info(f"aligner {name}: removed")

    def find(self, name: str) -> Served:
        if (found := self.served.get(name)) is None:
            raise UnknownAligner(f"no model {name[:64]!r}; there are: {', '.join(sorted(self.served))}")
        return found

    # ---- requests ------------------------------------------------------------------------------------------

    def law(self, given: dict[str, Any]) -> PARParams:
        """The settings of this server with those of a request; raises BadRequest for one out of range."""
        try:
            return request_params(self.settings.params, given)
        except ValueError as error:
            raise BadRequest(str(error)) from None

    def new_tokens(self, wanted: int | None) -> int:
        new = self.usual if wanted is None else wanted
        if new >= self.max_length:
            raise TooLong(f"max_tokens={new}: expected less than {self.max_length}, which the prompt shares")
        return new

    def encode_dialogue(
        self, turns: Sequence[tuple[bool, str]], system: str | None, new_tokens: int, add_bos: bool
    ) -> list[int]:
        """The ids of a dialogue, cut as in training to leave room for `new_tokens`; raises TooLong where its
        headers do not fit, or it is too long to be worth cutting.

        turns: as in `prompts.render_dialogue`.
        """
        return self.encode_cut(
            prompts.render_dialogue(turns, self.settings.config.template, system), new_tokens, add_bos
        )

    def encode_cut(self, text: str, new_tokens: int, add_bos: bool) -> list[int]:
        """`encode_dialogue` of a dialogue that is text already."""
        room = self.max_length - new_tokens
        most = max(MOST_CUT * room, 4096)
        with self.lock:
            # A character has at most four bytes, and hardly a token is shorter: short texts are not counted.
            if 4 * len(text) > most and (found := len(encode(self.tokenizer, [text])[0])) > most:
                raise TooLong(
                    f"a dialogue of {found} tokens, and room for {room}: leave its oldest turns out"
                )
            try:
                return encode_prompts(self.tokenizer, [text], room, add_bos)[0][0]
            except UserError as error:
                raise TooLong(str(error)) from None

    def encode_text(self, text: str, add_bos: bool) -> list[int]:
        with self.lock:
            ids = encode(self.tokenizer, [text])[0]
        return [self.tokenizer.bos_token_id, *ids] if add_bos else ids

    def requests(
        self,
        served: Served,
        prompt_ids: Iterable[Sequence[int]],
        params: PARParams,
        new_tokens: int | None,
        seed: int,
        stop: Sequence[str],
        n: int = 1,
        logprobs: int | None = None,
        stop_token_ids: Sequence[int] = (),
    ) -> list[Request]:
        """One request per answer: n to each prompt, drawn as rows 0 ... n - 1.

        new_tokens: None is the usual length, or what the prompt leaves of it. Raises TooLong.
        """
        found = []
        for ids in prompt_ids:
            room = self.max_length - len(ids)
            new = min(self.usual, room) if new_tokens is None else new_tokens
            if new > room or new < 1:
                raise TooLong(
                    f"a prompt of {len(ids)} tokens and an answer of {max(new, 1)} are more than the "
                    f"{self.max_length} that this server holds"
                )
            for row in range(n):
                request = (tuple(ids), served.aligner, params, new, seed, row, tuple(stop), logprobs)
                found.append(Request(*request, tuple(stop_token_ids)))
        return found


def positions(model) -> int:
    """How many tokens a model tells apart by place."""
    return getattr(model.config, "max_position_embeddings", None) or 1 << 31
