"""Reads the synthetic tasks' texts token by token, with loops and dicts, and answers them: what the tests hold them to.

A reader gets the tokens up to and including the one at which an answer begins, the answer's number, and the task. It
returns the answer, a tuple of tokens, and the pool that somebody who understands nothing but the form would pick from.
"""

import itertools
import statistics

STOP, AND, IS, ASK, NEEDLE, VAR, FINAL, LIST, COMMON, FREQUENT = range(1, 11)
DIGITS, HEX, WORDS = range(16, 26), range(32, 48), range(64, 512)


def mqar(tokens, number, task):
    told = tokens[: 2 * task.num_pairs]
    pairs = dict(zip(told[::2], told[1::2]))
    ends = [value for value in pairs.values() if value not in pairs]
    assert len(pairs) == len(set(pairs.values())) == task.num_pairs
    assert max(pairs) < task.V // 2 <= min(ends) and len(tokens) > len(told)
    token, hops = tokens[-1], 0
    while token in pairs:
        token, hops = pairs[token], hops + 1
    assert hops == task.hops and len(ends) == task.num_pairs // hops
    return (token,), [(end,) for end in ends]


def joint_recall(tokens, number, task):
    third = (task.V - 1) // 3
    values, context = {}, None
    for this, following in itertools.pairwise(tokens):
        if 1 <= this <= third:
            context = this
        elif third < this <= 2 * third and following > 2 * third:
            assert (context, this) not in values, "told twice"
            values[context, this] = following
    asked = tokens[-2:]
    assert len(values) == task.num_contexts * task.num_keys
    pool = [(v,) for (_, key), v in values.items() if key == asked[1]]
    assert len(set(pool)) == len(pool)
    return (values[tuple(asked)],), pool


def selective_copy(tokens, number, task):
    data = [token for token in tokens if token > 1]
    assert tokens.count(1) == number
    return (data[number - 1],), [(token,) for token in range(2, task.V)]


def induction_hops(tokens, number, task):
    place = len(tokens) - 1
    for _ in range(tokens[0] - task.letters):
        place = 1 + max(j for j in range(place) if tokens[j] == tokens[place])
    return (tokens[place],), [(token,) for token in range(task.letters)]


def needles(tokens, number, task):
    begin = max(i for i, token in enumerate(tokens) if token == ASK)
    told = {}
    for i in range(begin):
        if tokens[i] == NEEDLE:
            middle, end = tokens.index(IS, i), tokens.index(STOP, i)
            key = tuple(tokens[i + 1 : middle])
            told.setdefault(key, []).append(tuple(tokens[middle + 1 : end]))
    question = tokens[begin + 1 : tokens.index(IS, begin)]
    answers = [value for key in parts(question) for value in told[key]]
    values = [value for values in told.values() for value in values]
    assert len(set(values)) == len(values)
    assert len(told) >= task.num_keys
    answer = answers[(number - 1) % len(answers)]  # counted over all questions
    places = [i for i in range(begin) if tuple(tokens[i : i + len(answer)]) == answer]
    assert len(places) == 1, "the value stands in its needle only"
    return answer, values


def variable_tracking(tokens, number, task):
    begin = max(i for i, token in enumerate(tokens) if token == ASK)
    number_of, i = {}, 0
    while i < begin:
        if tokens[i] != VAR:
            i += 1
            continue
        middle, end = tokens.index(IS, i), tokens.index(STOP, i)
        name, held = tuple(tokens[i + 1 : middle]), tuple(tokens[middle + 1 : end])
        assert name not in number_of
        number_of[name] = number_of[held[1:]] if held[0] == VAR else held
        i = end
    asked = tuple(tokens[begin + 1 : tokens.index(IS, begin)])
    names = [name for name, held in number_of.items() if held == asked]
    assert len(names) == task.hops + 1
    return names[number - 1], list(number_of)


def hop_needles(tokens, number, task):
    begin = max(i for i, token in enumerate(tokens) if token == FINAL)
    follows = {
        tuple(tokens[i + 1 : i + 3]): tuple(tokens[i + 4 : i + 6])
        for i in range(begin)
        if tokens[i] == NEEDLE
    }
    assert len(follows) == task.hops * (1 + task.noise)
    name = tuple(tokens[begin + 1 : begin + 3])
    assert name not in follows.values(), "a chain is asked from its beginning"
    for _ in range(task.hops):
        name = follows[name]
    ends = [last for last in follows.values() if last not in follows]
    return name, ends


def common_words(tokens, number, task):
    words = listed_words(tokens)
    common = [w for w in dict.fromkeys(words) if words.count(w) == task.times_common]
    assert len(common) == task.num_common
    rare = set(words) - set(common)
    assert {words.count(w) for w in rare} == {task.times_rare}
    return common[number - 1], list(dict.fromkeys(words))


def frequent_words(tokens, number, task):
    words = [word for word in listed_words(tokens) if word != (STOP, STOP)]
    ranked = sorted(set(words), key=words.count, reverse=True)
    counts = [words.count(word) for word in ranked]
    assert counts[0] > counts[1] > counts[2] > counts[3]
    assert len(words) < listed_words(tokens).count((STOP, STOP)) * 2
    return ranked[number - 1], ranked


def listops(tokens, number, task):
    stack = [[]]
    for token in tokens[:-1]:
        if 1 <= token <= 10:
            stack[-1].append(token - 1)
        elif 11 <= token <= 14:
            stack.append([token])
        elif token == 16:
            operator, *values = stack.pop()
            made = {11: min, 12: max, 13: statistics.median, 14: sum}[operator](values)
            stack[-1].append(int(made) % 10)
    assert tokens[-1] == 15 and tokens.count(15) == 1
    ((value,),) = stack
    return (1 + value,), [(digit,) for digit in range(1, 11)]


READERS = {
    "mqar": mqar,
    "joint_recall": joint_recall,
    "selective_copy": selective_copy,
    "induction_hops": induction_hops,
    "variable_tracking": variable_tracking,
    "hop_needles": hop_needles,
    "common_words": common_words,
    "frequent_words": frequent_words,
    "listops": listops,
}


def reader(name):
    """The reader of a task: one for all kinds of needles."""
    return READERS.get(name, needles)


def parts(tokens):
    """Tuples of the tokens between ANDs."""
    found = [[]]
    for token in tokens:
        if token == AND:
            found.append([])
        else:
            found[-1].append(token)
    return [tuple(part) for part in found]


def listed_words(tokens):
    """The list's words, two tokens each."""
    begin = tokens.index(LIST) + 1
    end = max(i for i, token in enumerate(tokens) if token in (COMMON, FREQUENT))
    return list(zip(tokens[begin:end:2], tokens[begin + 1 : end : 2]))
