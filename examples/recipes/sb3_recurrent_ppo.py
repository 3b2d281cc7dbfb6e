"""Train sb3-contrib's RecurrentPPO with fusecell: one line after the model is made.

pip install fusecell sb3-contrib
python examples/recipes/sb3_recurrent_ppo.py
"""

from __future__ import annotations

from side_by_side import Step, compare

import fusecell as fc


def program(fusecell: bool, small: bool) -> Step:
    """CartPole with an LSTM for the actor and one for the critic; a step is a rollout and its epochs."""
    import gymnasium
    from sb3_contrib import RecurrentPPO

    steps = 32 if small else 128
    model = RecurrentPPO("MlpLstmPolicy", gymnasium.make("CartPole-v1"), n_steps=steps, seed=0, device="cpu")
    if fusecell:
        fc.replace(model.policy)

    def step() -> float:
        model.learn(steps, reset_num_timesteps=False)
        return float(model.logger.name_to_value["train/loss"])

    return step


if __name__ == "__main__":
    compare(program)
