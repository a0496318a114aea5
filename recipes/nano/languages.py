"""Captions of a scene in five languages.

The nouns are given with their indefinite articles, which depend on the gender
of the noun in German, French and Spanish. Japanese has no articles.
"""

# Class -> its noun in `LANGUAGES`, English excepted.
NOUNS = {
    "cat": ("eine Katze", "un chat", "un gato", "猫"),
    "dog": ("ein Hund", "un chien", "un perro", "犬"),
    "pig": ("ein Schwein", "un cochon", "un cerdo", "豚"),
    "frog": ("ein Frosch", "une grenouille", "una rana", "カエル"),
    "panda": ("ein Panda", "un panda", "un panda", "パンダ"),
    "lion": ("ein Löwe", "un lion", "un león", "ライオン"),
    "elephant": ("ein Elefant", "un éléphant", "un elefante", "象"),
    "penguin": ("ein Pinguin", "un pingouin", "un pingüino", "ペンギン"),
    "owl": ("eine Eule", "une chouette", "un búho", "フクロウ"),
    "duck": ("eine Ente", "un canard", "un pato", "アヒル"),
    "crab": ("eine Krabbe", "un crabe", "un cangrejo", "カニ"),
    "turtle": ("eine Schildkröte", "une tortue", "una tortuga", "カメ"),
    "snail": ("eine Schnecke", "un escargot", "un caracol", "カタツムリ"),
    "bee": ("eine Biene", "une abeille", "una abeja", "ハチ"),
    "butterfly": ("ein Schmetterling", "un papillon", "una mariposa", "蝶"),
    "fish": ("ein Fisch", "un poisson", "un pez", "魚"),
    "apple": ("ein Apfel", "une pomme", "una manzana", "リンゴ"),
    "banana": ("eine Banane", "une banane", "una banana", "バナナ"),
    "pear": ("eine Birne", "une poire", "una pera", "洋梨"),
    "strawberry": ("eine Erdbeere", "une fraise", "una fresa", "イチゴ"),
    "watermelon": (
        "eine Wassermelone",
        "une pastèque",
        "una sandía",
        "スイカ",
    ),
    "pineapple": ("eine Ananas", "un ananas", "una piña", "パイナップル"),
    "carrot": ("eine Karotte", "une carotte", "una zanahoria", "ニンジン"),
    "pizza": ("eine Pizza", "une pizza", "una pizza", "ピザ"),
    "hamburger": (
        "ein Hamburger",
        "un hamburger",
        "una hamburguesa",
        "ハンバーガー",
    ),
    "cake": ("ein Kuchen", "un gâteau", "una tarta", "ケーキ"),
    "donut": ("ein Donut", "un donut", "una rosquilla", "ドーナツ"),
    "mushroom": ("ein Pilz", "un champignon", "un champiñón", "キノコ"),
    "cactus": ("ein Kaktus", "un cactus", "un cactus", "サボテン"),
    "tree": ("ein Baum", "un arbre", "un árbol", "木"),
    "sunflower": (
        "eine Sonnenblume",
        "un tournesol",
        "un girasol",
        "ヒマワリ",
    ),
    "car": ("ein Auto", "une voiture", "un coche", "車"),
    "bus": ("ein Bus", "un bus", "un autobús", "バス"),
    "bicycle": ("ein Fahrrad", "un vélo", "una bicicleta", "自転車"),
    "rocket": ("eine Rakete", "une fusée", "un cohete", "ロケット"),
    "helicopter": (
        "ein Hubschrauber",
        "un hélicoptère",
        "un helicóptero",
        "ヘリコプター",
    ),
    "sailboat": ("ein Segelboot", "un voilier", "un velero", "ヨット"),
    "tractor": ("ein Traktor", "un tracteur", "un tractor", "トラクター"),
    "house": ("ein Haus", "une maison", "una casa", "家"),
    "umbrella": ("ein Regenschirm", "un parapluie", "un paraguas", "傘"),
    "key": ("ein Schlüssel", "une clé", "una llave", "鍵"),
    "guitar": ("eine Gitarre", "une guitare", "una guitarra", "ギター"),
    "drum": ("eine Trommel", "un tambour", "un tambor", "太鼓"),
    "clock": ("eine Uhr", "une horloge", "un reloj", "時計"),
    "bell": ("eine Glocke", "une cloche", "una campana", "ベル"),
    "star": ("ein Stern", "une étoile", "una estrella", "星"),
    "crown": ("eine Krone", "une couronne", "una corona", "王冠"),
    "balloon": ("ein Ballon", "un ballon", "un globo", "風船"),
    "robot": ("ein Roboter", "un robot", "un robot", "ロボット"),
    "anchor": ("ein Anker", "une ancre", "un ancla", "錨"),
}

# Language -> the text between two nouns, and before the last one.
LANGUAGES = {
    "en": (", ", " and "),
    "de": (", ", " und "),
    "fr": (", ", " et "),
    "es": (", ", " y "),
    "ja": ("、", "と"),
}
TRANSLATED = tuple(LANGUAGES)[1:]


def noun(name, language):
    """Return a class's noun with its indefinite article.

    Args:
        name: str, a class. English takes any noun.
        language: str, a key of `LANGUAGES`.
    """
    if language == "en":
        return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return NOUNS[name][TRANSLATED.index(language)]


def caption(names, language):
    """Write the caption of a scene.

    Args:
        names: list of str, the objects' classes from left to right.
        language: str, a key of `LANGUAGES`.

    Returns:
        str, such as "a cat, an owl and a pig".
    """
    between, before_last = LANGUAGES[language]
    *others, last = [noun(name, language) for name in names]
    return between.join(others) + before_last + last if others else last
