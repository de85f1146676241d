"""Words of the demo's world: short English words to read and copy, people, cities, things to ask about.

Plain data. The reading skill also makes up letter strings, so the model reads letters and not only these words.
"""

from __future__ import annotations

import random

WORDS = tuple(
    """
    able acid acorn actor air alarm album anchor angle animal ankle apple apron arch arm army arrow art ash atlas
    atom aunt axe baby badge bag baker ball band bank barn basin basket bat bath beach bead beam bean bear beard bed
    bee bell belt bench berry bike bird bite blade blanket block board boat body bolt bone book boot bottle bowl box
    boy brain branch brass bread brick bridge broom brush bucket bug bulb bus bush butter button cabin cable cage cake
    calf camel camp can canal candle canoe cap car card carpet cart castle cat cave chain chair chalk cheese cherry
    chess chest chin circus city clay clock cloth cloud clown club coach coal coast coat coffee coin comb cook copper
    coral corn couch cow crab crane crayon cream crowd crown cube cup curtain cushion dance dawn day deer desk dice
    dish dog doll door dot dragon drawer dream dress drill drop drum duck dust eagle ear earth east egg elbow engine
    eye face fan farm feather fence ferry field finger fire fish flag flame flask floor flour flower flute fly foam
    fog foot forest fork fox frame frog fruit game garage garden gate ghost giant glass globe glove goat gold goose
    grape grass guitar hall hammer hand harbour hat hawk head heart heavy hen hill honey hook horn horse hotel hour
    house ice igloo ink iron island ivory ivy jacket jam jar jelly jewel judge juice jungle kettle key king kitchen
    kite knee knife knot ladder lake lamp land leaf leg lemon letter lily lime line lion lip list lizard lock log
    lunch magnet map marble market mask meadow melon metal mice milk mill mint mirror money monkey month moon moss
    mother motor mouse mouth mud mug music nail name napkin neck needle nest net night noise noon north nose nut oak
    oar ocean office oil olive onion opera otter oven owl ox oyster page paint palm panda paper park parrot path paw
    pea peach pear pearl pen pencil pepper piano pie pig pilot pin pipe planet plant plate plum pocket poem poet
    pond pony post pot pump puppy purse queen quilt rabbit radio rail rain ranch razor rice river road robot rock
    roof room root rope rose rug ruler sail salad salt sand school sea seal seed sheep shelf ship shirt shoe shop
    silk silver sink sister skate ski skin sky sled smile smoke snail snake snow soap sock sofa soil song soup south
    spade spoon spring stair stamp steam stone stool store storm stove straw street sugar summer sun swan table tail
    tank taxi tea team tent test thread throat thumb ticket tiger tile toast tomato tongue tooth torch tower town toy
    track train tray tree truck trumpet tube tulip tunnel turkey turtle twig uncle vase velvet village violin voice
    wagon wall walnut watch water wave wax web well west whale wheat wheel whip wind window wing winter wolf wood
    wool word worm wrist yard year yellow zebra zero zone zoo
    """.split()
)

NAMES = {
    "en": tuple(
        "Anna Ben Clara David Emma Frank Grace Henry Iris Jack Kate Leo Maria Nina Oscar Paul Rosa Sam Tom Vera".split()
    ),
    "zh": ("小明", "小红", "李华", "王芳", "张伟", "刘洋", "陈静", "赵强", "小丽", "小刚"),
}

CITIES = {
    "en": tuple(
        "Paris London Berlin Tokyo Rome Madrid Oslo Cairo Lima Delhi Vienna Prague Boston Dublin Athens Seoul".split()
    ),
    "zh": ("北京", "上海", "广州", "深圳", "杭州", "成都", "西安", "南京", "武汉", "重庆"),
}

# What lies outside the demo's world. Subjects fill the slots of requests in skills/chat.py.
SUBJECTS = {
    "en": (
        "France", "the moon", "quantum physics", "love", "the stock market", "my career", "football", "history",
        "the Roman empire", "a good novel", "cooking pasta", "politics", "climate change", "bitcoin", "the ocean",
        "black holes", "tax law", "my headache", "Shakespeare", "photosynthesis", "the weather", "medicine", "dogs",
        "Italian wine", "train times", "jazz", "the French revolution", "democracy", "yoga", "Mars", "the economy",
    ),
    "zh": (
        "法国", "月亮", "量子物理", "爱情", "股票", "足球", "历史", "唐朝", "小说", "做菜", "政治", "气候变化", "比特币",
        "海洋", "黑洞", "法律", "头痛", "莎士比亚", "光合作用", "天气", "医学", "狗", "红酒", "火车时刻", "音乐", "经济",
    ),
}  # fmt: skip


def letters(rng: random.Random, length: int) -> str:
    """A made-up word, consonants and vowels in turn; no letter that looks like another one."""
    consonants, vowels = "bcdfghkmnprstvwz", "aeou"
    start = rng.randint(0, 1)
    return "".join(rng.choice((consonants, vowels)[(i + start) % 2]) for i in range(length))
