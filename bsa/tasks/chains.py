"""Answers that lie several steps away: variables, needles that point to needles, and induction repeated."""

import dataclasses

import numpy as np

from bsa.tasks import example, words


@dataclasses.dataclass(frozen=True)
class VariableTracking(example.BatchTask):
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

    def draw_many(
        self, num_tokens: int, rng: np.random.Generator, num: int
    ) -> example.Examples:
        chains, steps = self.num_chains, self.hops + 1
        name_BNL = words.draw_codes("name", num, chains * steps, rng)
        number_BCL = words.draw_codes("short_number", num, chains, rng)
        name_BCSL = name_BNL.reshape(num, chains, steps, -1)
        # Chains take turns at random; each keeps its own order.
        turn_N = np.repeat(np.arange(chains), steps)
        turn_BN = rng.permuted(np.tile(turn_N, (num, 1)), axis=1)
        place_BN = np.argsort(turn_BN, axis=1, kind="stable")
        told_BNL = self._statements(name_BCSL, number_BCL)
        statement_BNL = np.empty_like(told_BNL)
        np.put_along_axis(statement_BNL, place_BN[..., None], told_BNL, axis=1)

        asked = (np.arange(num), rng.integers(chains, size=num))
        end = words.question(words.ASK, number_BCL[asked][:, None], name_BCSL[asked])
        return _told("variable_tracking", statement_BNL, *end, num_tokens, rng)

    def chance(self, num_tokens: int) -> float:
        """One of the names in the text."""
        return 1 / (self.num_chains * (self.hops + 1))

    def _statements(self, name_BCSL, number_BCL):
        """The chains' statements, one chain after another; 0 ends the shorter ones."""
        *axes, name_len = name_BCSL.shape
        statement = np.zeros((*axes, 3 + name_len + number_BCL.shape[-1]), int)
        statement[..., 0] = words.VAR
        statement[..., 1 : 1 + name_len] = name_BCSL
        statement[..., 1 + name_len] = words.IS
        held = statement[..., 2 + name_len :]
        held[:, :, 0, :-1], held[:, :, 0, -1] = number_BCL, words.STOP
        held[:, :, 1:, 0] = words.VAR
        held[:, :, 1:, 1 : 1 + name_len] = name_BCSL[:, :, :-1]
        held[:, :, 1:, 1 + name_len] = words.STOP
        return statement.reshape(axes[0], -1, statement.shape[-1])


@dataclasses.dataclass(frozen=True)
class HopNeedles(example.BatchTask):
    """Needles that point to needles, asked for the last name only.

    `NEEDLE x_i IS x_(i+1) STOP` for `hops` steps of 1 + `noise` chains, shuffled over random words; then `FINAL x_0 IS`
    wants x_hops. After the two-hop needles of GCA (arXiv 2410.01651), whose model says every name on the way and so may
    retrieve one hop at each: here nothing on the way is told.
    """

    hops: int = 2
    noise: int = 5
    V: int = words.V

    def draw_many(
        self, num_tokens: int, rng: np.random.Generator, num: int
    ) -> example.Examples:
        chains = 1 + self.noise
        name_BNL = words.draw_codes("name", num, chains * (self.hops + 1), rng)
        name_BCSL = name_BNL.reshape(num, chains, self.hops + 1, -1)
        this, following = name_BCSL[:, :, :-1], name_BCSL[:, :, 1:]

        def column(mark):
            return np.full((*this.shape[:-1], 1), mark)

        parts = [column(words.NEEDLE), this, column(words.IS), following]
        told = np.concatenate([*parts, column(words.STOP)], axis=-1)
        statement_BNL = told.reshape(num, -1, told.shape[-1])
        order_N = np.arange(statement_BNL.shape[1])[:, None]
        order_BN1 = rng.permuted(np.tile(order_N, (num, 1, 1)), axis=1)
        statement_BNL = np.take_along_axis(statement_BNL, order_BN1, axis=1)
        asked_BSL = name_BCSL[np.arange(num), rng.integers(chains, size=num)]
        end = words.question(words.FINAL, asked_BSL[:, :1], asked_BSL[:, -1:])
        return _told("hop_needles", statement_BNL, *end, num_tokens, rng)

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


def _told(name, statement_BNL, end_BS, end_id_S, num_tokens, rng):
    """Statements strewn over random words, and the question at the end."""
    num_told = np.count_nonzero(statement_BNL[0])
    example.check_room(name, num_tokens, num_told + len(end_id_S) - 1)
    space = num_tokens + 1 - num_told - len(end_id_S)
    filler_BT = words.draw_filler("words", len(end_BS), space, rng)
    text_BT = words.strew(statement_BNL, filler_BT, rng)
    answer_id = np.concatenate([np.zeros(text_BT.shape[1], int), end_id_S])
    return example.from_texts(np.concatenate([text_BT, end_BS], axis=1), answer_id)
