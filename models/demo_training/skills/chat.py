"""Small talk: greetings, what the model is and can do, thanks; a polite no to all outside its world."""

from __future__ import annotations

import random

from models.demo_training.checkers import contains
from models.demo_training.dialogue import Exercise, conversation, in_language, pick_language, vary
from models.demo_training.lexicon import CITIES, NAMES, SUBJECTS, WORDS
from models.demo_training.names import Language
from models.demo_training.sample import Sample

GREETING = {
    "en": "Hello! Show me a picture or a clip and ask me about it.",
    "zh": "你好！给我看一张图片或一段视频，然后问我吧。",
}
IDENTITY = {
    "en": "I am the demo model of Octet, a small vision-language model trained on drawn pictures.",
    "zh": "我是Octet的演示模型，一个用绘制图片训练的小型视觉语言模型。",
}
ABILITIES = {
    "en": "I can name shapes and colours, count to nine, read numbers and short words, compare pictures, "
    "follow simple clips, calculate, repeat text, call tools and write JSON.",
    "zh": "我能说出形状和颜色、数到九、读数字和短单词、比较图片、看懂简单的视频、"
    "做算术、复述文字、调用工具和写JSON。",
}
THANKS = {"en": "You are welcome!", "zh": "不客气！"}
FAREWELL = {"en": "Goodbye!", "zh": "再见！"}
REFUSAL = {
    "en": "Sorry, that is outside my small world. I know simple pictures and clips, numbers and short words.",
    "zh": "抱歉，这超出了我的小世界。我只懂简单的图片和视频、数字和短单词。",
}
NO_PICTURE = {"en": "I see no picture. Please send one.", "zh": "我没有看到图片，请发一张。"}

# kind -> (questions en, questions zh, answers, chain en, chain zh)
_TALK = {
    "greeting": (
        (
            "Hi",
            "Hello",
            "Hello!",
            "Hi there!",
            "Hey",
            "Good morning!",
            "Good evening.",
            "hello",
            "hi!",
            "Hey there",
            "Good afternoon",
            "How are you?",
            "Hi, how are you?",
            "Hello, my name is {name}.",
        ),
        ("你好", "你好！", "您好", "早上好！", "晚上好", "嗨", "你好吗？", "你好，我叫{name}。", "大家好"),
        GREETING,
        "The user greets me.",
        "用户在打招呼。",
    ),
    "identity": (
        (
            "Who are you?",
            "What are you?",
            "What is your name?",
            "Tell me about yourself.",
            "Are you a robot?",
            "What model are you?",
            "Who made you?",
            "Introduce yourself.",
            "who are you",
            "Which model is this?",
        ),
        (
            "你是谁？",
            "你叫什么名字？",
            "介绍一下你自己。",
            "你是什么模型？",
            "你是机器人吗？",
            "谁创造了你？",
            "你是谁",
        ),
        IDENTITY,
        "The user asks who I am.",
        "用户问我是谁。",
    ),
    "abilities": (
        (
            "What can you do?",
            "How can you help me?",
            "What are you able to do?",
            "Help",
            "What do you know?",
            "What should I ask you?",
            "help me",
            "What are your abilities?",
            "What kinds of questions can I ask?",
        ),
        ("你能做什么？", "你会什么？", "你能帮我什么？", "我可以问你什么？", "帮助", "你有什么功能？"),
        ABILITIES,
        "The user asks what I can do.",
        "用户问我能做什么。",
    ),
    "thanks": (
        (
            "Thank you!",
            "Thanks",
            "Thanks a lot!",
            "Great, thank you.",
            "thank you",
            "Well done!",
            "Good job.",
        ),
        ("谢谢！", "谢谢你", "多谢！", "太好了，谢谢。", "做得好！"),
        THANKS,
        "The user thanks me.",
        "用户在感谢我。",
    ),
    "farewell": (
        ("Bye", "Goodbye!", "See you later.", "bye bye", "Good night!", "See you tomorrow"),
        ("再见", "再见！", "拜拜", "晚安！", "下次见"),
        FAREWELL,
        "The user says goodbye.",
        "用户在道别。",
    ),
    "no_picture": (
        (
            "What is in the picture?",
            "Describe the image.",
            "How many circles are there?",
            "What colour is the star?",
            "Which picture shows a red heart?",
            "What number is in the picture?",
            "Read the word.",
            "What do you see?",
        ),
        (
            "图片里有什么？",
            "描述这张图片。",
            "有几个圆形？",
            "星形是什么颜色？",
            "图中的数字是多少？",
            "读出这个单词。",
        ),
        NO_PICTURE,
        "There is no picture in the message.",
        "消息里没有图片。",
    ),
}

_OUTSIDE = {
    "en": (
        "Tell me about {subject}.",
        "What do you think about {subject}?",
        "Write a poem about {subject}.",
        "Explain {subject} to me.",
        "What is the capital of {subject}?",
        "Who invented the {word}?",
        "How does {subject} work?",
        "Write an essay about {subject}.",
        "What is the weather in {city}?",
        "Translate '{word}' into German.",
        "Tell me a joke.",
        "Write a Python program that sorts a list.",
        "What happened in {year}?",
        "Who is the president of {subject}?",
        "Recommend a restaurant in {city}.",
        "How do I cook {word}?",
        "What is the meaning of life?",
        "Tell me a story about a {word}.",
        "How far is {city} from {city2}?",
        "Summarise the history of {city}.",
        "Can you book a flight to {city}?",
        "What is the population of {city}?",
        "Why is the sky blue?",
        "How old is {name}?",
        "Sing a song about {subject}.",
        "Give me advice about {subject}.",
        "Is {subject} important?",
        "What does '{word}' mean?",
        "Who won the football match in {city}?",
        "Write an email to {name}.",
        "Do you like {subject}?",
    ),
    "zh": (
        "给我讲讲{subject}。",
        "你怎么看{subject}？",
        "写一首关于{subject}的诗。",
        "解释一下{subject}。",
        "{city}的天气怎么样？",
        "谁发明了电话？",
        "{subject}是怎么回事？",
        "写一篇关于{subject}的文章。",
        "讲个笑话。",
        "写一个排序的程序。",
        "{year}年发生了什么？",
        "推荐一家{city}的餐厅。",
        "人生的意义是什么？",
        "讲一个关于{subject}的故事。",
        "{city}离{city2}有多远？",
        "{city}有多少人口？",
        "天空为什么是蓝色的？",
        "{name}今年多大？",
        "帮我订去{city}的机票。",
        "给我一些关于{subject}的建议。",
        "给{name}写一封信。",
        "你喜欢{subject}吗？",
        "把这句话翻译成英文。",
    ),
}

_REFUSAL_MARKS = ("outside my small world", "超出了我的小世界")


def sample(rng: random.Random) -> Sample:
    """One turn of small talk, sometimes after another one."""
    language = pick_language(rng)
    exercises = [_talk(rng, rng.choice(list(_TALK)), language) for _ in range(1 if rng.random() < 0.8 else 2)]
    return conversation(rng, "chat", language, exercises)


def sample_refusal(rng: random.Random) -> Sample:
    language = pick_language(rng)
    cities = rng.sample(CITIES[language], 2)
    question = rng.choice(_OUTSIDE[language]).format(
        subject=rng.choice(SUBJECTS[language]),
        word=rng.choice(WORDS),
        city=cities[0],
        city2=cities[1],
        name=rng.choice(NAMES[language]),
        year=rng.randint(1500, 2030),
    )
    chain = in_language(language, "This is not about my world.", "这和我的世界无关。")
    exercise = Exercise(question, REFUSAL[language], chain, contains(*_REFUSAL_MARKS))
    earlier = [_talk(rng, "greeting", language)] if rng.random() < 0.15 else []
    return conversation(rng, "refusal", language, [*earlier, exercise])


def _talk(rng: random.Random, kind: str, language: Language) -> Exercise:
    questions_en, questions_zh, answers, chain_en, chain_zh = _TALK[kind]
    question = vary(rng, language, questions_en, questions_zh, name=rng.choice(NAMES[language]))
    core = {lang: text.split("!")[0].split("！")[0].rstrip(".。") for lang, text in answers.items()}
    return Exercise(
        question, answers[language], in_language(language, chain_en, chain_zh), contains(*core.values())
    )
