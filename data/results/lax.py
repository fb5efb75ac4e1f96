"""A reward with a hole, to show what happens: it credits a right start, whatever follows.

    python train.py --reward data/results/lax.py:right_start
"""

from data.tasks import task_of


def right_start(prompts, responses, rows):
    return [best_start(row, response) for row, response in zip(rows, responses)]


def best_start(row, response):
    reward, words = task_of(row["_task"]).reward, response.split()
    return max(reward(row, " ".join(words[:n])) for n in range(len(words) + 1))
