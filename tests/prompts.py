"""Whole prompts, which the model gets at once without a session or a pipeline."""


def make_prompt(processor, frames, *turns) -> dict:
    """Tokenizes a conversation about frames with the chat template.

    Args:
        turns: texts of user and assistant, who alternate. After a user's text the assistant is to answer.
    """
    messages = [
        {"role": ("user", "assistant")[index % 2], "content": [{"type": "text", "text": text}]}
        for index, text in enumerate(turns)
    ]
    messages[0]["content"].insert(0, {"type": "video", "video": frames})
    options = dict(tokenize=True, return_dict=True, return_tensors="pt")
    return processor.apply_chat_template(messages, add_generation_prompt=len(turns) % 2 == 1, **options)
