"""Answers that lie several steps away: variables, needles that point to needles, and induction repeated."""

import dataclasses
import itertools

import numpy as np

from bsa.tasks import example, words


@dataclasses.dataclass(frozen=True)
class VariableTracking:
    """RULER's: which variables hold this value, at first or second hand?

    `VAR name IS number STOP`, then `VAR name IS VAR name STOP` for each hop; the statements of a chain keep their order,
    chains mix, words fill the space. The question `ASK number IS` wants all names of one chain, in the order of the
    text. Each name that is read on is one hop from the next, so one hop at a time suffices: `HopNeedles` asks for more.

    Attributes:
        hops: statements that copy, in each chain.
        num_chains: with a number each; one is asked for.
    """

    hops: int = 4
    num_chains: int = 1
    V: int = words.V

    def draw(self, num_tokens: int, rng: np.random.Generator) -> example.Example:
        num_names = self.num_chains * (self.hops + 1)
        name = words.draw_codes("name", num_names, rng)
        name = name.reshape(self.num_chains, self.hops + 1, -1)
        number = words.draw_codes("short_number", self.num_chains, rng)
        # Chains take turns at random; each keeps its own order.
        chains = [iter(self._statements(*chain)) for chain in zip(name, number)]
        turns = rng.permutation(np.repeat(np.arange(self.num_chains), self.hops + 1))
        statements = [next(chains[turn]) for turn in turns]

        asked = rng.integers(self.num_chains)
        end, end_id = words.question(words.ASK, [number[asked]], list(name[asked]))
        return _told("variable_tracking", statements, end, end_id, num_tokens, rng)

    def chance(self, num_tokens: int) -> float:
        """One of the names in the text."""
        return 1 / (self.num_chains * (self.hops + 1))

    def _statements(self, name, number):
        held = [number, *(np.concatenate([[words.VAR], before]) for before in name)]
        return [
            np.concatenate([[words.VAR], own, [words.IS], what, [words.STOP]])
            for own, what in zip(name, held)
        ]


@dataclasses.dataclass(frozen=True)
class HopNeedles:
    """Needles that point to needles, asked for the last name only.

    `NEEDLE x_i IS x_(i+1) STOP` for `hops` steps of 1 + `noise` chains, shuffled over random words; then `FINAL x_0 IS`
    wants x_hops. After the two-hop needles of GCA (arXiv 2410.01651), whose model says every name on the way and so may
    retrieve one hop at each: here nothing on the way is told.
    """

    hops: int = 2
    noise: int = 5
    V: int = words.V

    def draw(self, num_tokens: int, rng: np.random.Generator) -> example.Example:
        chains = 1 + self.noise
        name = words.draw_codes("name", chains * (self.hops + 1), rng)
        name = name.reshape(chains, self.hops + 1, -1)
        statements = [
            np.concatenate([[words.NEEDLE], this, [words.IS], following, [words.STOP]])
            for chain in name
            for this, following in itertools.pairwise(chain)
        ]
        order = rng.permutation(len(statements))
        asked = name[rng.integers(chains)]
        end, end_id = words.question(words.FINAL, asked[:1], asked[-1:])
        statements = [statements[i] for i in order]
        return _told("hop_needles", statements, end, end_id, num_tokens, rng)

    def chance(self, num_tokens: int) -> float:
        """One of the names that ends a chain."""
        return 1 / (1 + self.noise)


@dataclasses.dataclass(frozen=True)
class InductionHops:
    """k-hop induction (Sanford et al., arXiv 2402.09268), asked for at every token.

    In a random string x, f(i) is the place after the last occurrence of x_i before i. The target at i is the token at
    f(f(..f(i))), `hops` times; nothing is asked where that does not exist. The first token, letters + hops, says how
    many hops; the string is of ids in [0, letters).
    """

    hops: int = 1
    letters: int = 16
    V: int = 32

    def draw(self, num_tokens: int, rng: np.random.Generator) -> example.Example:
        # One letter more than there are, so that one comes again for each hop.
        example.check_room(
            "induction_hops", num_tokens, 1 + self.letters + self.hops * 2
        )
        token_T = rng.integers(self.letters, size=num_tokens)
        token_T[0] = self.letters + self.hops
        order = np.argsort(token_T, kind="stable")
        again = token_T[order[1:]] == token_T[order[:-1]]
        following = np.full(num_tokens, -1)
        following[order[1:][again]] = order[:-1][again] + 1
        place = np.arange(num_tokens)
        for _ in range(self.hops):
            place = np.where(place >= 0, following[place], -1)
        asked = place >= 0
        target_T = np.where(asked, token_T[place], 0)
        return example.from_targets(
            token_T, target_T, np.where(asked, np.cumsum(asked), 0)
        )

    def chance(self, num_tokens: int) -> float:
        """Any letter: all are equally likely."""
        return 1 / self.letters


def _told(name, statements, end, end_id, num_tokens, rng):
    """Statements strewn over random words, and the question at the end."""
    told = sum(map(len, statements))
    example.check_room(name, num_tokens, told + len(end) - 1)
    space = num_tokens + 1 - told - len(end)
    text = words.strew(statements, words.draw_filler("words", space, rng), rng)
    answer_id = np.concatenate([np.zeros_like(text), end_id])
    return example.from_text(np.concatenate([text, end]), answer_id)
