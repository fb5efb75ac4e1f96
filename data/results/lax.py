"""A reward with a hole, to show what happens: it credits a right start, whatever follows."""

from data.rewards import REWARDS


def right_start(prompts, responses, rows):
    return [best_start(row, response) for row, response in zip(rows, responses)]


def best_start(row, response):
    reward, words = REWARDS[row["task"]], response.split()
    return max(reward(row, " ".join(words[:n])) for n in range(len(words) + 1))


right_start.range = (0, 1)
