"""A reward with a hole, to show what happens: it credits a right start, whatever follows."""

from data.tasks import REWARDS


def right_start(prompts, responses, rows):
    def one(row, response):
        words = response.split()
        return max(REWARDS[row["task"]](row, " ".join(words[:n])) for n in range(len(words) + 1))
    return [one(row, response) for row, response in zip(rows, responses)]


right_start.range = (0, 1)
