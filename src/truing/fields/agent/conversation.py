"""An environment of two speakers: a simulated user in role "user", the assistant in "policy".

The task's `prompt` opens; its `persona`, where there is one, tells the user's model whom it plays.
After the assistant's last turn the whole dialogue is scored by a registered reward.
"""

from __future__ import annotations

from typing import cast

from truing.context import Json
from truing.core.judging.scores import kind_of, total_scores
from truing.core.rollout import POLICY, Observation, Step
from truing.errors import InputError
from truing.method import check_component, component
from truing.tables import Message, Row

USER = "user"
PERSONA = (
    "You play a person who talks to an assistant. Write only what this person says next: one short"
    " question or remark on the answer."
)


class Conversation:
    """See the module's docstring."""

    def __init__(self, turns: int, reward: dict[str, object] | None) -> None:
        self.turns, self.reward = turns, reward
        self.said: list[Message] = []
        self.persona = PERSONA

    def reset(self, seed: int, task: Row) -> Observation:
        """The user's opening words."""
        prompt = task.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise InputError(
                "field 'prompt' must be the user's opening words",
                where=f"conversation task {task.get('id', '')}".strip(),
                seen=prompt,
            )
        self.persona = (
            f"{PERSONA} The person: {task['persona']}" if task.get("persona") else PERSONA
        )
        self.said = [{"role": "user", "content": prompt}]
        return Observation(prompt)

    def step(self, action: Json) -> Step:
        """Pass on what one speaker says to the other."""
        if self.said[-1]["role"] == "assistant":
            self.said.append({"role": "user", "content": str(action)})
            return Step(Observation(str(action)), 0.0, done=False)
        self.said.append({"role": "assistant", "content": str(action)})
        if len(self.said) < 2 * self.turns:
            heard = str(action)
            if len(self.said) == 2:  # its own opening was not its action: tell it
                heard = f"You asked: {self.said[0]['content']}\nThe assistant answers: {heard}"
            return Step(Observation(heard, USER, self.persona), 0.0, done=False)
        value = 0.0
        if self.reward is not None:
            row: Row = {"prompt": self.said[:-1], "completion": str(action), "finished": True}
            value = total_scores(self.reward, [row], where="conversation")[0]
        return Step(Observation(""), {POLICY: value}, done=True)

    def snapshot(self) -> Json:
        """What was said, and who the user is."""
        return {"said": [dict(m) for m in self.said], "persona": self.persona}

    def restore(self, snapshot: Json) -> None:
        """Take both back."""
        state = cast("dict[str, object]", snapshot)
        self.said = [dict(m) for m in cast("list[Message]", state["said"])]
        self.persona = str(state["persona"])


@component("environment")
def conversation(*, turns: int = 3, reward: dict[str, object] | None = None) -> Conversation:
    """A dialogue with a simulated user.

    Args:
        turns: answers of the assistant.
        reward: reference to a reward or check that scores the last answer with the dialogue as its
            prompt, the sum where it names several values; None gives 0.
    """
    if turns < 1:
        raise InputError("turns must be at least 1", where="conversation", seen=turns)
    if reward is not None:
        check_component(kind_of(reward), reward, where="conversation")
    return Conversation(turns, reward)
