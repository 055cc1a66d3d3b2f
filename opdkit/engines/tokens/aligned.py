"""One answer in two tokenizers: which tokens of the student cover the same bytes as which of the teacher. No torch.

Both sequences of bytes are cut wherever both sides have a token's end. What lies between two cuts is a span:

    student   " is"  " "  "2" "0" "1"  "4"  "."
    teacher   " is"  " "  "201"        "4"  "."        spans (1, 1) (1, 1) (3, 1) (1, 1) (1, 1)

The student's tokens are those it sampled, never encoded again; the teacher's are its own encoding of the same text.
Nothing is filled in where the two do not meet: such tokens are in no span, and nothing is said of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

from opdkit.contexts.render import Renderer
from opdkit.engines.tokens.token_bytes import TokenBytes, encode_plainly, token_bytes
from opdkit.errors import UserError

MOST_TOKENS = 6  # of a span on either side; a longer one says too little of each of its tokens
THOUGHT_TAGS = (b"<think>", b"</think>")

Side = tuple[Renderer, int, str]  # how a model reads, the id that ends its turns, its name


@dataclass(frozen=True, slots=True)
class Span:
    """Tokens of both sides with the same bytes; places in the two sequences, ends not included."""

    student: tuple[int, int]
    teacher: tuple[int, int]

    @property
    def sizes(self) -> tuple[int, int]:
        return self.student[1] - self.student[0], self.teacher[1] - self.teacher[0]


@dataclass(frozen=True, slots=True)
class Reading:
    """An answer as the teacher reads it, and the spans of which it can say something, in order."""

    teacher_ids: tuple[int, ...]
    spans: tuple[Span, ...]


def cut(student: Sequence[bytes], teacher: Sequence[bytes]) -> list[Span]:
    """The spans between common ends of two sequences of tokens, none of them empty, up to the first byte in which
    their texts differ. O(bytes)."""
    agreed = _num_agreed(b"".join(student), b"".join(teacher))
    ours = {end: place for place, end in enumerate(accumulate(map(len, student)), 1) if end <= agreed}
    theirs = {end: place for place, end in enumerate(accumulate(map(len, teacher)), 1) if end <= agreed}
    cuts = [(0, 0), *((ours[end], theirs[end]) for end in ours if end in theirs)]
    return [Span((i, k), (j, m)) for (i, j), (k, m) in pairwise(cuts)]


def valid_text(data: bytes) -> str:
    """The longest beginning that is UTF-8: an answer may stop inside a character, or write none."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        return data[: error.start].decode()


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """How a teacher reads the student's answers.

    encode      text -> ids of the teacher, in which no text is a special token; raises ValueError for a text that the
                teacher's tokenizer does not know
    ends        the ids that end a turn, (student's, teacher's)
    pair_stops  whether those two are one pair, so that the teacher's word on stopping is heard
    """

    student: TokenBytes
    teacher: TokenBytes
    encode: Callable[[str], Sequence[int]]
    ends: tuple[int, int]
    pair_stops: bool = True

    @cached_property
    def teacher_id(self) -> dict[int, int]:
        """{student's id: teacher's} of single tokens that are one: same bytes (of several such ids the one that
        encoding writes), the tags of a thought, and the end of a turn. These are the candidates of a top-k list."""
        ours, theirs = self.student, self.teacher
        found = {ours.id_of[piece]: theirs.id_of[piece] for piece in ours.id_of.keys() & theirs.id_of.keys()}
        tags = ({p: i for i in side.names if (p := side.bytes_V[i]) in THOUGHT_TAGS} for side in (ours, theirs))
        our_tags, their_tags = tags
        found |= {our_tags[tag]: their_tags[tag] for tag in our_tags.keys() & their_tags.keys()}
        if self.is_renumbered:
            named = {name: token for token, name in theirs.names.items()}
            found |= {token: named[name] for token, name in ours.names.items() if name in named}
        end, their_end = self.ends
        found = {token: other for token, other in found.items() if token != end and other != their_end}
        return found | ({end: their_end} if self.pair_stops else {})

    @cached_property
    def is_renumbered(self) -> bool:
        """Whether the two have one vocabulary, perhaps under other ids: then the teacher reads the very tokens that
        were sampled, and tokens of one name are one token."""
        ours, theirs = self.student, self.teacher
        once = all(len(side.id_of) == side.num_compared for side in (ours, theirs))
        return once and ours.id_of.keys() == theirs.id_of.keys()

    def read(self, answer_ids: Sequence[int], room: int | None = None) -> Reading:
        """room: how many tokens the teacher can read; of the rest it says nothing."""
        end, their_end = self.ends
        ended = bool(answer_ids) and answer_ids[-1] == end
        body = answer_ids[:-1] if ended else answer_ids
        if self.is_renumbered and all(token in self.teacher_id for token in body):
            ids, synced = [self.teacher_id[token] for token in body], True
            spans = [Span((place, place + 1), (place, place + 1)) for place in range(len(body))]
        else:
            ids, spans, synced = self._read_text(body)
        if ended and synced and self.pair_stops:
            spans.append(Span((len(body), len(body) + 1), (len(ids), len(ids) + 1)))
            ids.append(their_end)
        if room is not None:
            ids, spans = ids[:room], [span for span in spans if span.teacher[1] <= room]
        return Reading(tuple(ids), tuple(spans))

    def _read_text(self, body: Sequence[int]) -> tuple[list[int], list[Span], bool]:
        """The teacher's ids of the visible text, the spans, and whether both sides have the same bytes to the end."""
        seen = [(place, piece) for place, token in enumerate(body) if (piece := self.student.bytes_V[token])]
        places, pieces = [place for place, _ in seen], [piece for _, piece in seen]
        text = valid_text(b"".join(pieces))
        try:
            ids = list(self.encode(text))
        except ValueError:
            return [], [], False
        theirs = []
        for token in ids:
            piece = self.teacher.bytes_V[token]
            if piece is None:  # an unknown character: from here on the two are not known to agree
                break
            theirs.append(piece)
        spaced = _num_spaces(b"".join(theirs)) > _num_spaces(text.encode())
        if spaced:  # some tokenizers put one in front of every text
            theirs[0] = theirs[0][1:]
        spans = [
            Span((places[span.student[0]], places[span.student[1] - 1] + 1), span.teacher)
            for span in cut(pieces, theirs)
        ]
        kept = [span for span in spans if self._is_usable(span, body, ids) and not (spaced and span.teacher[0] == 0)]
        synced = len(theirs) == len(ids) and b"".join(theirs) == b"".join(pieces)
        return ids, kept, synced

    def _is_usable(self, span: Span, body: Sequence[int], ids: Sequence[int]) -> bool:
        """Not too long, and without markup: a special token of the student inside, of which the teacher saw nothing, or
        a tag that is one token on one side and letters on the other."""
        if max(span.sizes) > MOST_TOKENS:
            return False
        ours, theirs = body[slice(*span.student)], ids[slice(*span.teacher)]
        if span.sizes == (1, 1) and self.teacher_id.get(ours[0]) == theirs[0]:
            return True
        return self.student.markup.isdisjoint(ours) and self.teacher.markup.isdisjoint(theirs)


def align(student: Side, teacher: Side, *, pair_stops: bool) -> Alignment:
    """Raises UserError where a tokenizer's bytes are not known, or the two have no token in common."""
    ours, theirs = (token_bytes(renderer.tokenizer, name) for renderer, _, name in (student, teacher))

    def encode(text: str) -> Sequence[int]:
        try:
            return encode_plainly(teacher[0].tokenizer, text)
        except Exception as error:  # tokenizers raises plain Exception for a character it does not know
            raise ValueError(str(error)) from error

    alignment = Alignment(
        student=ours, teacher=theirs, encode=encode, ends=(student[1], teacher[1]), pair_stops=pair_stops
    )
    if not ours.id_of.keys() & theirs.id_of.keys():
        raise UserError(f"{student[2]} and {teacher[2]} have no token of the same bytes, so nothing could be compared")
    return alignment


def _num_spaces(text: bytes) -> int:
    """In front."""
    return len(text) - len(text.lstrip(b" "))


def _num_agreed(one: bytes, other: bytes) -> int:
    """How many bytes the two begin with alike."""
    if one == other:
        return len(one)
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
