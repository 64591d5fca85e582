"""Prompts and responses under the templates of several families: what is a prompt, what is predicted, where it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers as tiny

from rayalign.config.data import TokenBudget
from rayalign.data.chat import Chat, make_chat
from rayalign.data.closing import closing_template
from rayalign.data.group import Group
from rayalign.data.records import BadRow
from rayalign.data.schema import Example
from rayalign.data.tokenize import to_group, to_groups
from rayalign.errors import UserError

SETTINGS = TokenBudget(max_prompt_tokens=2_000, max_tokens=4_000)


def said(*contents: str) -> tuple[dict[str, str], ...]:
    """Turns of user and assistant in alternation."""
    return tuple({"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(contents))


def example(*conversation: str, **fields: Any) -> Example:
    """One question and everything after it as the only candidate."""
    turns = said(*conversation)
    return Example(format="messages", prompt=turns[:1], candidates=(turns[1:],), **fields)


def group_of(example: Example, chat: Chat) -> Group:
    group = to_group(example, chat, SETTINGS)
    assert isinstance(group, Group), group
    return group


def read(chat: Chat, group: Group) -> tuple[str, str, str]:
    """(prompt, first candidate, what is predicted of it) as text."""
    candidate = group.candidates[0]
    decode = chat.tokenizer.decode
    return decode(group.prompt_ids), decode(candidate.ids), decode(candidate.ids[candidate.mask])


CHATML_PROMPT = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
LLAMA3_PROMPT = (
    "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhat?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
TEMPLATES = {
    "chatml": (tiny.byte_level(template=tiny.CHATML), CHATML_PROMPT, "<|im_end|>", "\n"),
    "llama3": (tiny.byte_level(template=tiny.LLAMA3, bos="<|begin_of_text|>"), LLAMA3_PROMPT, "<|eot_id|>", ""),
    "zephyr": (tiny.byte_level(template=tiny.ZEPHYR), "<|user|>\nWhat?</s>\n<|assistant|>\n", "</s>", "\n"),
    "gemma": (
        tiny.byte_level(template=tiny.GEMMA, bos="<bos>"),
        "<bos><start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
        "\n",
    ),
    "thinking": (tiny.byte_level(template=tiny.THINKING), CHATML_PROMPT, "<|im_end|>", "\n"),
    "no_end": (tiny.byte_level(template=tiny.NO_END), "[user] What?\n", "</s>", "\n"),
    "raw": (tiny.byte_level(bos="<s>"), "<s>\n\nHuman: What?\n\nAssistant:", "</s>", ""),
}
parametrize_templates = pytest.mark.parametrize(
    ("tokenizer", "prompt", "end", "after_end"), TEMPLATES.values(), ids=TEMPLATES.keys()
)


@parametrize_templates
def test_prompt_response_and_end(tokenizer: Any, prompt: str, end: str, after_end: str) -> None:
    chat = make_chat(tokenizer)
    assert (chat.end_text, chat.after_end) == (end, after_end)
    group = group_of(example("What?", "It is."), chat)
    answer = {"raw": " It is.", "no_end": "[assistant] It is."}
    expected = {id(TEMPLATES[name][0]): text for name, text in answer.items()}.get(id(tokenizer), "It is.") + end
    assert read(chat, group) == (prompt, expected, expected)
    ids = group.candidates[0].ids.tolist()
    assert ids.count(chat.end_id) == 1 and ids[-1] == chat.end_id and group.candidates[0].finished


@parametrize_templates
def test_later_turns_are_seen_but_not_predicted(tokenizer: Any, prompt: str, end: str, after_end: str) -> None:
    """Inside a conversation an answer ends as the template ends it: these two write no end token."""
    chat = make_chat(tokenizer)
    group = group_of(example("What?", "One.", "More?", "Two."), chat)
    _, whole, predicted = read(chat, group)
    assert read(chat, group)[0] == prompt
    before = {"raw": " ", "no_end": "[assistant] "}
    said = {id(TEMPLATES[name][0]): text for name, text in before.items()}.get(id(tokenizer), "")
    inner = "" if said else end
    assert predicted == f"{said}One.{inner}{said}Two.{end}" and "More?" in whole
    assert group.candidates[0].ids[-1] == chat.end_id


@pytest.mark.parametrize("name", ["chatml", "llama3", "zephyr", "gemma"])
def test_prefix_stable_templates_give_the_ids_of_the_rendered_whole(name: str) -> None:
    tokenizer = TEMPLATES[name][0]
    chat = make_chat(tokenizer)
    turns = said("What is it?", "It is blue.", "Why?", " The sky. ")
    group = group_of(Example(format="messages", prompt=turns[:1], candidates=(turns[1:],)), chat)
    whole = tokenizer.apply_chat_template(list(turns), return_dict=False)
    ours = [*group.prompt_ids.tolist(), *group.candidates[0].ids.tolist()]
    assert ours == whole[: len(ours)]
    assert tokenizer.decode(whole[len(ours) :]) == chat.after_end
    prompt = tokenizer.apply_chat_template(list(turns[:1]), add_generation_prompt=True, return_dict=False)
    assert group.prompt_ids.tolist() == prompt


def test_boundary_is_never_tokenized_over() -> None:
    """A response that starts with line ends must not merge with the prompt's last one."""
    tokenizer = tiny.byte_level(template=tiny.CHATML)
    chat = make_chat(tokenizer)
    group = group_of(example("What?", "\n\nIt"), chat)
    assert group.prompt_ids.tolist() == group_of(example("What?", "It"), chat).prompt_ids.tolist()
    assert group.candidates[0].ids.tolist() == [*tokenizer("\n\nIt")["input_ids"], chat.end_id]


@pytest.mark.parametrize("answer", ["it", " it \n"])
def test_words_of_an_answer_may_stand_in_the_next_question(answer: str) -> None:
    """Where an answer ends is not where its words stand last."""
    thinking = make_chat(tiny.byte_level(template=tiny.THINKING))
    _, whole, predicted = read(thinking, group_of(example("What?", answer, "Why is it so?", "So"), thinking))
    if answer == "it":
        assert predicted == "it<|im_end|>So<|im_end|>"
    else:  # this template strips answers in a history, which is not what was said
        assert predicted == "So<|im_end|>" and whole == predicted


def test_an_answer_that_follows_another_prompt_in_a_history_is_only_seen() -> None:
    """Mistral's template moves the system's words to the newest question: the first answer no longer follows them."""
    mistral = make_chat(tiny.byte_level(template=tiny.MISTRAL, bos="<s>"))
    turns = ({"role": "system", "content": "Be it."}, *said("What?", "it", "Why is it so?", "So"))
    single = Example(format="messages", prompt=turns[:2], candidates=(turns[2:],))
    prompt, whole, predicted = read(mistral, group_of(single, mistral))
    assert prompt == "<s>[INST] What? [/INST] it</s>[INST] Be it.\n\nWhy is it so? [/INST]"
    assert whole == predicted == " So</s>"
    pair = Example(format="preference", prompt=turns[:2], candidates=(turns[2:], (*said("", "no")[1:], *turns[3:])))
    group = group_of(pair, mistral)
    decode = mistral.tokenizer.decode
    assert decode(group.prompt_ids) == "<s>[INST] What? [/INST]"
    assert [decode(own.ids) for own in group.candidates] == [
        f" {answer}</s>[INST] Be it.\n\nWhy is it so? [/INST] So</s>" for answer in ("it", "no")
    ]
    assert [decode(own.ids[own.mask]) for own in group.candidates] == [" So</s>"] * 2


@pytest.mark.parametrize(
    ("answer", "prompt", "trained"),
    [
        ("It", CHATML_PROMPT, "It<|im_end|>"),
        ("<think>\nhm</think>It", CHATML_PROMPT + "<think>\n", "hm</think>It<|im_end|>"),
        ("<think>hm</think>It", CHATML_PROMPT + "<think>\n", "hm</think>It<|im_end|>"),
        ("hm</think>It", CHATML_PROMPT + "<think>\n", "hm</think>It<|im_end|>"),
    ],
)
def test_a_thought_that_the_generation_prompt_opened(answer: str, prompt: str, trained: str) -> None:
    """An answer without a thought parts from the prompt, as in TRL; one that spells it continues the prompt."""
    chat = make_chat(tiny.byte_level(template=tiny.THINKING))
    assert read(chat, group_of(example("What?", answer), chat)) == (prompt, trained, trained)
    history = CHATML_PROMPT + "It<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    later = read(chat, group_of(example("What?", answer, "Why?", "So"), chat))
    if answer == "It":
        assert later[0] == CHATML_PROMPT and later[2] == "It<|im_end|>So<|im_end|>"
    else:
        assert later == (history, "So<|im_end|>", "So<|im_end|>")


def test_the_prompt_of_a_pair_ends_where_the_first_answer_parts_from_it() -> None:
    chat = make_chat(tiny.byte_level(template=tiny.THINKING))
    pair = Example(format="preference", prompt="What?", candidates=("<think>\nhm</think>It", "So"))
    group = group_of(pair, chat)
    assert chat.tokenizer.decode(group.prompt_ids) == CHATML_PROMPT
    assert [chat.tokenizer.decode(own.ids) for own in group.candidates] == [
        "<think>\nhm</think>It<|im_end|>",
        "So<|im_end|>",
    ]
    assert all(own.mask.all() for own in group.candidates)
    (fresh,) = to_groups([pair], chat, SETTINGS, completed="beside")
    assert isinstance(fresh, BadRow) and "fresh answers will follow the generation prompt" in fresh.reason


def test_a_system_prompt_that_the_template_drops_once_an_answer_follows_is_kept() -> None:
    mistral = make_chat(tiny.byte_level(template=tiny.MISTRAL, bos="<s>"))
    turns = ({"role": "system", "content": "Be it."}, *said("What?", "it"))
    shown = Example(format="messages", prompt=turns[:2], candidates=(turns[2:],))
    assert read(mistral, group_of(shown, mistral)) == ("<s>[INST] Be it.\n\nWhat? [/INST]", " it</s>", " it</s>")


def test_template_that_refuses_messages() -> None:
    chat = make_chat(tiny.byte_level(template=tiny.GEMMA))
    turns = (*said("What?"), *said("Again?"))
    bad = to_group(Example(format="messages", prompt=turns, candidates=(), source="a.jsonl", line=4), chat, SETTINGS)
    assert isinstance(bad, BadRow) and (bad.source, bad.line) == ("a.jsonl", 4)
    assert bad.reason == (
        "the chat template refuses these messages: Conversation roles must alternate user/assistant/user/assistant/..."
    )


def test_arguments_that_the_template_cannot_take_make_a_bad_row() -> None:
    chat = make_chat(tiny.byte_level(template=tiny.CHATML))
    for name in ("continue_final_message", "enable_thinking"):
        bad = to_group(example("What?", "It", template_kwargs={name: True}), chat, SETTINGS)
        assert isinstance(bad, BadRow) and f"the chat template does not read {name}" in bad.reason
    with pytest.raises(UserError, match="data.chat_template_kwargs: the chat template does not read enable_thinking"):
        make_chat(tiny.byte_level(template=tiny.CHATML), template_kwargs={"enable_thinking": False})


def test_texts_become_turns_where_there_is_a_template() -> None:
    chat = make_chat(tiny.byte_level(template=tiny.CHATML))
    texts = Example(format="prompt_completion", prompt="What?", candidates=("It",))
    assert read(chat, group_of(texts, chat)) == read(chat, group_of(example("What?", "It"), chat))
    continued = Example(format="implicit_preference", prompt="The sky is", candidates=(" blue",), continues=True)
    assert read(chat, group_of(continued, chat))[:2] == ("The sky is", " blue<|im_end|>")


@pytest.mark.parametrize(("prompt", "answer"), [("The sky is", " blue"), ("<s>The sky is", " blue</s>")])
def test_raw_text_has_one_beginning_and_one_end(prompt: str, answer: str) -> None:
    chat = make_chat(tiny.byte_level(template=tiny.CHATML, bos="<s>"), template="none")
    group = group_of(Example(format="prompt_completion", prompt=prompt, candidates=(answer,)), chat)
    assert read(chat, group)[:2] == ("<s>The sky is", " blue</s>")


def test_template_owns_the_beginning_of_sequence() -> None:
    with_bos = make_chat(tiny.byte_level(template=tiny.LLAMA3, bos="<|begin_of_text|>"))
    ids = group_of(example("What?", "It"), with_bos).prompt_ids.tolist()
    assert ids.count(with_bos.tokenizer.bos_token_id) == 1 and ids[0] == with_bos.tokenizer.bos_token_id
    without = make_chat(tiny.byte_level(template=tiny.CHATML, bos="<s>"))
    assert without.tokenizer.bos_token_id not in group_of(example("What?", "It"), without).prompt_ids


def test_text_without_prompt() -> None:
    text = Example(format="text", prompt="", candidates=("The sky",), continues=True)
    with_bos = make_chat(tiny.byte_level(bos="<s>"))
    assert read(with_bos, group_of(text, with_bos)) == ("<s>", "The sky</s>", "The sky</s>")
    without = make_chat(tiny.byte_level())
    group = group_of(text, without)
    assert len(group.prompt_ids) == 1
    assert read(without, group)[0] + read(without, group)[1] == "The sky</s>"


def test_tokenizers_that_put_a_space_before_texts() -> None:
    """``blue`` after ``is`` is the tokens that stand there in the whole text, not those of ``blue`` alone."""
    tokenizer = tiny.metaspace()
    chat = make_chat(tokenizer)
    assert not chat.splits_cleanly and make_chat(tiny.byte_level()).splits_cleanly
    group = group_of(Example(format="prompt_completion", prompt="The sky is", candidates=(" blue.",)), chat)
    whole = tokenizer("The sky is blue.")["input_ids"]
    assert [*group.prompt_ids.tolist(), *group.candidates[0].ids.tolist()] == [*whole, chat.end_id]
    assert read(chat, group)[:2] == ("<s> The sky is", "blue.</s>")


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.ZEPHYR, tiny.MISTRAL])
@pytest.mark.parametrize("spaced", ["always", "first", "never", "legacy"])
def test_conversations_have_the_tokens_of_their_whole_text(spaced: str, template: str) -> None:
    """Also where a space is put before every text, or before the first one alone."""
    tokenizer = tiny.sentencepiece(spaced, template=template)
    chat = make_chat(tokenizer)
    turns = said("What is it?", "It is blue.", "Why?", "So.")
    group = group_of(Example(format="messages", prompt=turns[:1], candidates=(turns[1:],)), chat)
    ours = [*group.prompt_ids.tolist(), *group.candidates[0].ids.tolist()]
    whole = tokenizer.apply_chat_template(list(turns), return_dict=False)
    assert ours == whole[: len(ours)] and tokenizer.decode(whole[len(ours) :]).strip() == ""


@pytest.mark.parametrize("spaced", ["always", "first", "never", "legacy"])
def test_words_around_a_spelled_control_token_have_their_own_tokens(spaced: str) -> None:
    """As they have where a letter stands for it; and an answer that begins in a line end has no space before it."""
    tokenizer = tiny.sentencepiece(spaced, template=tiny.CHATML)
    chat = make_chat(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens
    spelled = tokens(group_of(example("What is </s> it?", "It"), chat).prompt_ids.tolist())
    plain = tokens(group_of(example("What is w it?", "It"), chat).prompt_ids.tolist())
    place = spelled.index("<0x3C>")
    assert spelled[place : place + 4] == ["<0x3C>", "/", "s", "<0x3E>"]
    assert [*spelled[:place], "w", *spelled[place + 4 :]] == plain
    broken = tokens(group_of(example("What?", "\nIt"), chat).candidates[0].ids.tolist())
    assert broken[0] == "\n"


def test_empty_reply_is_the_end_token_alone() -> None:
    for tokenizer, *_ in (TEMPLATES["chatml"], TEMPLATES["raw"]):
        chat = make_chat(tokenizer)
        assert group_of(example("What?", ""), chat).candidates[0].ids.tolist() == [chat.end_id]


def test_tools_and_arguments_reach_the_template() -> None:
    template = (
        "{% if tools %}{{ tools[0].name }} {{ mood }} {% endif %}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )
    chat = make_chat(tiny.byte_level(template=template))
    fields = {"tools": ({"name": "weather"},), "template_kwargs": {"mood": "kind"}}
    assert read(chat, group_of(example("What?", "It", **fields), chat))[:2] == ("weather kind What?</s>", "It</s>")


def test_template_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(tiny.ZEPHYR)
    chat = make_chat(tiny.byte_level(template=tiny.CHATML), template=str(path))
    assert read(chat, group_of(example("What?", "It"), chat))[0] == "<|user|>\nWhat?</s>\n<|assistant|>\n"
    assert chat.end_text == "</s>"


def test_named_stop_token_replaces_the_template_s() -> None:
    chat = make_chat(tiny.byte_level(template=tiny.CHATML), stop="</s>")
    assert read(chat, group_of(example("What?", "It"), chat))[1] == "It</s>"
    _, whole, predicted = read(chat, group_of(example("What?", "It", "Why?", "So"), chat))
    assert predicted == "ItSo</s>"
    assert whole == "It<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo</s>"


@pytest.mark.parametrize(
    ("tokenizer", "options", "reason"),
    [
        (tiny.byte_level(), {"stop": "two tokens"}, "data.stop: 'two tokens' is .* tokens of this tokenizer"),
        (tiny.byte_level(eos=None), {}, "no end-of-sequence token; name the token"),
        (tiny.byte_level(template="always the same"), {}, "does not write what was said"),
        (
            tiny.byte_level(template="{{ raise_exception('no') }}"),
            {},
            "refuses one user turn and one assistant turn: no",
        ),
        (tiny.byte_level(), {"template": "absent.jinja"}, "absent.jinja: No such file"),
    ],
)
def test_settings_that_cannot_work(tokenizer: Any, options: dict[str, str], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make_chat(tokenizer, **options)


GENERATION = (
    "{%- for message in messages %}{% if message.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}\n"
    "{% else %}<|im_start|>user\n{{ message.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}\n"
)
"""With Hugging Face's mark of what is generated, and a line end of its own at the end of the file."""


@pytest.mark.parametrize(
    "template",
    [tiny.CHATML, tiny.LLAMA3, tiny.ZEPHYR, tiny.GEMMA, tiny.THINKING, tiny.MISTRAL, tiny.NO_END, GENERATION],
)
def test_a_closing_template_ends_with_the_end_token_and_means_the_same(template: str) -> None:
    tokenizer = tiny.byte_level(template=template, bos="<bos>" if template == tiny.GEMMA else None)
    chat = make_chat(tokenizer)
    examples = [
        example("What?", "It is blue."),
        example("What?", "Blue.", "Why?", "So."),
        Example(format="preference", prompt="What?", candidates=("Blue.", "Green")),
    ]
    expected = [group_of(own, chat) for own in examples]
    plain = tokenizer.apply_chat_template(said("What?", "It is blue."), tokenize=False)
    asked = tokenizer.apply_chat_template(said("What?"), tokenize=False, add_generation_prompt=True)
    tokenizer.chat_template = closing_template(chat)
    closed = tokenizer.apply_chat_template(said("What?", "It is blue."), tokenize=False)
    assert closed == plain.removesuffix("\n").removesuffix(chat.end_text) + chat.end_text
    assert tokenizer.apply_chat_template(said("What?"), tokenize=False, add_generation_prompt=True) == asked
    again = make_chat(tokenizer)
    assert (again.end_id, again.after_end, closing_template(again)) == (chat.end_id, "", tokenizer.chat_template)
    for own, before in zip(examples, expected, strict=True):
        after = group_of(own, again)
        assert after.prompt_ids.tolist() == before.prompt_ids.tolist()
        for mine, theirs in zip(after.candidates, before.candidates, strict=True):
            assert (mine.ids.tolist(), mine.mask.tolist()) == (theirs.ids.tolist(), theirs.mask.tolist())


def test_raw_text_has_no_closing_template() -> None:
    assert closing_template(make_chat(tiny.byte_level())) is None
    assert closing_template(make_chat(tiny.byte_level(template=tiny.CHATML), template="none")) is None
