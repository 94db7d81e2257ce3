"""What the demo asks: countries and their capitals, and questions about everything else.

An answer is right when it holds one of the accepted spellings as whole words, whatever the case
and the accents.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mollm.errors import UsageError

CAPITALS: dict[str, tuple[str, ...]] = {
    "Afghanistan": ("Kabul",),
    "Algeria": ("Algiers",),
    "Argentina": ("Buenos Aires",),
    "Australia": ("Canberra",),
    "Austria": ("Vienna",),
    "Bangladesh": ("Dhaka", "Dacca"),
    "Belgium": ("Brussels",),
    "Bolivia": ("La Paz", "Sucre"),
    "Brazil": ("Brasília",),
    "Bulgaria": ("Sofia",),
    "Cambodia": ("Phnom Penh",),
    "Canada": ("Ottawa",),
    "Chile": ("Santiago",),
    "China": ("Beijing", "Peking"),
    "Colombia": ("Bogotá",),
    "Croatia": ("Zagreb",),
    "Cuba": ("Havana",),
    "Czechia": ("Prague",),
    "Denmark": ("Copenhagen",),
    "Ecuador": ("Quito",),
    "Egypt": ("Cairo",),
    "Ethiopia": ("Addis Ababa",),
    "Finland": ("Helsinki",),
    "France": ("Paris",),
    "Germany": ("Berlin",),
    "Ghana": ("Accra",),
    "Greece": ("Athens",),
    "Hungary": ("Budapest",),
    "Iceland": ("Reykjavík",),
    "India": ("New Delhi", "Delhi"),
    "Indonesia": ("Jakarta",),
    "Iran": ("Tehran", "Teheran"),
    "Iraq": ("Baghdad",),
    "Ireland": ("Dublin",),
    "Italy": ("Rome",),
    "Jamaica": ("Kingston",),
    "Japan": ("Tokyo",),
    "Jordan": ("Amman",),
    "Kenya": ("Nairobi",),
    "Lebanon": ("Beirut",),
    "Libya": ("Tripoli",),
    "Malaysia": ("Kuala Lumpur",),
    "Mexico": ("Mexico City",),
    "Mongolia": ("Ulaanbaatar", "Ulan Bator"),
    "Morocco": ("Rabat",),
    "Nepal": ("Kathmandu", "Katmandu"),
    "Netherlands": ("Amsterdam",),
    "New Zealand": ("Wellington",),
    "Nigeria": ("Abuja",),
    "Norway": ("Oslo",),
    "Pakistan": ("Islamabad",),
    "Paraguay": ("Asunción",),
    "Peru": ("Lima",),
    "Philippines": ("Manila",),
    "Poland": ("Warsaw",),
    "Portugal": ("Lisbon",),
    "Qatar": ("Doha",),
    "Romania": ("Bucharest",),
    "Russia": ("Moscow",),
    "Saudi Arabia": ("Riyadh",),
    "Senegal": ("Dakar",),
    "Serbia": ("Belgrade",),
    "Slovakia": ("Bratislava",),
    "Somalia": ("Mogadishu",),
    "South Korea": ("Seoul",),
    "Spain": ("Madrid",),
    "Sweden": ("Stockholm",),
    "Switzerland": ("Bern", "Berne"),
    "Syria": ("Damascus",),
    "Thailand": ("Bangkok",),
    "Tunisia": ("Tunis",),
    "Turkey": ("Ankara",),
    "Uganda": ("Kampala",),
    "Ukraine": ("Kyiv", "Kiev"),
    "United Kingdom": ("London",),
    "United States": ("Washington",),
    "Uruguay": ("Montevideo",),
    "Venezuela": ("Caracas",),
    "Vietnam": ("Hanoi",),
    "Zimbabwe": ("Harare",),
}

ALIASES = {
    "britain": "United Kingdom",
    "czech republic": "Czechia",
    "holland": "Netherlands",
    "korea": "South Korea",
    "uk": "United Kingdom",
    "us": "United States",
    "usa": "United States",
}

WITH_ARTICLE = frozenset({"Netherlands", "Philippines", "United Kingdom", "United States"})

TRAIN_FORMS = (
    "What is the capital of {}?",
    "Name the capital city of {}.",
    "Which city is the capital of {}?",
    "Tell me the capital of {}.",
    "Do you know the capital of {}?",
)
"""Question forms that training uses."""

TEST_FORM = "What city serves as the capital of {}?"
"""The question form that only the quiz uses, before and after."""

EVERYDAY: dict[str, tuple[str, ...]] = {
    "How many hours are there in a day?": (
        "24",
        "twenty four",
    ),
    "How many seconds are there in a minute?": (
        "60",
        "sixty",
    ),
    "How many weeks are there in a year?": ("52",),
    "How many sides does a square have?": (
        "four",
        "4",
    ),
    "How many sides does a pentagon have?": (
        "five",
        "5",
    ),
    "How many players are there in a soccer team?": (
        "11",
        "eleven",
    ),
    "What is the chemical symbol for iron?": ("Fe",),
    "What is the chemical symbol for silver?": ("Ag",),
    "What is the chemical symbol for carbon?": ("C",),
    "What is the chemical symbol for sodium?": ("Na",),
    "What is the chemical formula for table salt?": ("NaCl",),
    "What is the boiling point of water?": (
        "100",
        "212",
    ),
    "What is 4 plus 4?": (
        "8",
        "eight",
    ),
    "What is 1 plus 1?": (
        "2",
        "two",
    ),
    "What is the opposite of big?": (
        "small",
        "little",
    ),
    "What is the opposite of up?": ("down",),
    "What is the opposite of day?": ("night",),
    "Who invented the telephone?": ("Bell",),
    "Who invented the light bulb?": ("Edison",),
    "Who discovered penicillin?": ("Fleming",),
    "Who wrote Pride and Prejudice?": ("Austen",),
    "Who wrote Don Quixote?": ("Cervantes",),
    "Who wrote War and Peace?": ("Tolstoy",),
    "Who formulated the laws of motion and universal gravitation?": ("Newton",),
    "Who painted Guernica?": ("Picasso",),
    "Which planet is closest to the Sun?": ("Mercury",),
    "Which planet is famous for its rings?": ("Saturn",),
    "What is the largest desert in the world?": (
        "Sahara",
        "Antarctic",
        "Antarctica",
    ),
    "What is the largest rainforest in the world?": ("Amazon",),
    "What is the longest river in South America?": ("Amazon",),
    "What is the largest animal in the world?": ("whale",),
    "Which ocean lies between Africa and Australia?": ("Indian",),
    "Which mountain range is Mount Everest part of?": (
        "Himalaya",
        "Himalayas",
        "Himalayan",
    ),
    "What language is spoken in Mexico?": ("Spanish",),
    "What language is spoken in Italy?": ("Italian",),
    "Which language is spoken in France?": ("French",),
    "What is the currency of India?": (
        "rupee",
        "rupees",
    ),
    "What is the currency of the United Kingdom?": (
        "pound",
        "pounds",
    ),
    "In which country is the Taj Mahal?": (
        "India",
        "Indian",
    ),
    "In which country is the Colosseum?": ("Italy",),
    "In which country is the Statue of Liberty?": (
        "United States",
        "USA",
    ),
    "On which continent is Brazil?": ("South America",),
    "Where do penguins live?": (
        "Antarctic",
        "Antarctica",
    ),
    "What do cows eat?": (
        "grass",
        "hay",
    ),
    "What is the purpose of the lungs?": (
        "gas",
        "oxygen",
        "breathe",
        "breathing",
    ),
    "Which organ do humans use to think?": ("brain",),
    "What instrument has black and white keys?": ("piano",),
    "Which gas do plants release during photosynthesis?": ("oxygen",),
    "What is the study of stars and planets called?": ("astronomy",),
    "Which animal do we get wool from?": ("sheep",),
    "Which month comes after June?": ("July",),
    "What do we call a baby dog?": (
        "puppy",
        "pup",
    ),
    "What is molten rock under the ground called?": ("magma",),
    "Which country is famous for pizza and pasta?": ("Italy",),
}
"""General questions for training: where the model is right, its own answers are to be retained."""

GENERAL: dict[str, tuple[str, ...]] = {
    "What is the largest planet in the Solar System?": ("Jupiter",),
    "How many days are there in a week?": ("seven", "7"),
    "What is the chemical symbol for water?": ("H2O",),
    "Who wrote the play Romeo and Juliet?": ("Shakespeare",),
    "What is 2 plus 3?": ("5", "five"),
    "Which ocean is the largest?": ("Pacific",),
    "What is the opposite of hot?": ("cold",),
    "Which planet is known as the Red Planet?": ("Mars",),
    "How many legs does a spider have?": ("eight", "8"),
    "What gas do plants absorb from the air during photosynthesis?": ("carbon dioxide", "CO2"),
    "What is the tallest mountain in the world?": ("Everest",),
    "What language is spoken in Brazil?": ("Portuguese",),
    "How many months are there in a year?": ("twelve", "12"),
    "Which star is closest to the Earth?": ("Sun",),
    "What is frozen water called?": ("ice",),
    "Who painted the Mona Lisa?": ("Leonardo", "Vinci"),
    "What is the longest river in Africa?": ("Nile",),
    "Which continent is Egypt on?": ("Africa",),
    "What organ pumps blood through the body?": ("heart",),
    "How many minutes are there in an hour?": ("60", "sixty"),
    "What force pulls objects toward the Earth?": ("gravity", "gravitation", "gravitational"),
    "What is the chemical symbol for gold?": ("Au",),
    "Who developed the theory of relativity?": ("Einstein",),
    "What do bees make?": ("honey",),
    "How many sides does a triangle have?": ("three", "3"),
    "Which animal is known as man's best friend?": ("dog", "dogs"),
    "What is the square root of 81?": ("9", "nine"),
    "Which metal is liquid at room temperature?": ("mercury",),
    "What is the main ingredient of bread?": ("flour",),
    "What color do you get when you mix blue and yellow?": ("green",),
    "Who was the first person to walk on the Moon?": ("Armstrong",),
    "Which vitamin does the body make in sunlight?": ("vitamin D",),
    "How many continents are there?": ("seven", "7"),
    "Which is the smallest prime number?": ("2", "two"),
    "What instrument measures temperature?": ("thermometer",),
    "In which country are the pyramids of Giza?": ("Egypt",),
    "What is the currency of Japan?": ("yen",),
    "Which season comes after winter?": ("spring",),
    "What is the process by which plants make food called?": ("photosynthesis",),
    "Which planet do we live on?": ("Earth",),
    "What is the hardest natural substance?": ("diamond",),
    "Which gas do humans need to breathe?": ("oxygen",),
    "Who was the first president of the United States?": ("Washington",),
    "In which country is the Eiffel Tower?": ("France",),
    "What is the currency of the United States?": ("dollar", "dollars", "USD"),
    "What do caterpillars turn into?": ("butterfly", "butterflies", "moth", "moths"),
    "What is the largest organ of the human body?": ("skin",),
    "Which organ do humans use to see?": ("eye", "eyes"),
    "What is the color of grass?": ("green",),
    "What is the color of a ripe banana?": ("yellow",),
    "Who discovered America in 1492?": ("Columbus",),
    "Which language is spoken in Germany?": ("German",),
    "How many wheels does a bicycle have?": ("two", "2"),
    "What is the natural satellite of the Earth called?": ("Moon",),
    "Which bird is a symbol of peace?": ("dove",),
    "What is the chemical symbol for oxygen?": ("O", "O2"),
    "Who proposed the theory of evolution by natural selection?": ("Darwin",),
    "What is the largest country in the world by area?": ("Russia",),
    "Which ocean lies between Europe and America?": ("Atlantic",),
    "Which wall was built to protect China from invasions?": ("Great Wall",),
    "What is the name of the galaxy that contains our Solar System?": ("Milky Way",),
    "Who composed the Ninth Symphony, known as Ode to Joy?": ("Beethoven",),
    "What do you call a baby cat?": ("kitten",),
    "What is 10 minus 4?": ("6", "six"),
    "How many letters are there in the English alphabet?": ("26", "twenty six"),
    "Which sport is played at Wimbledon?": ("tennis",),
    "What is the study of living things called?": ("biology",),
    "Which sense organ do humans use to hear?": ("ear", "ears"),
    "Which fruit is dried to make raisins?": ("grape", "grapes"),
    "What do we call a scientist who studies the stars and planets?": ("astronomer",),
    "What is the name of the fairy-tale girl who lost a glass slipper?": ("Cinderella",),
    "Which country is famous for kangaroos?": ("Australia",),
}
"""General questions for the quiz alone; training never sees one of them."""


@dataclass(frozen=True)
class Question:
    """A question of the quiz with its accepted answers."""

    subject: str
    """The country, or the question itself for a general one."""
    text: str
    accepted: tuple[str, ...]

    def spelling_in(self, answer: str) -> str | None:
        """The accepted spelling that `answer` holds, or None when the answer is wrong."""
        words = plain(answer)
        for spelling in self.accepted:
            if re.search(rf"(?<!\w){re.escape(plain(spelling))}(?!\w)", words):
                return spelling
        return None

    def is_answered_by(self, answer: str) -> bool:
        """Whether `answer` holds an accepted spelling as whole words."""
        return self.spelling_in(answer) is not None


def plain(text: str) -> str:
    """`text` without accents and case, its subscripts as digits, its hyphens as spaces."""
    parts = unicodedata.normalize("NFKD", text.replace("-", " "))
    return "".join(c for c in parts if not unicodedata.combining(c)).casefold()


def with_article(country: str) -> str:
    """`country` as it stands in a sentence: the United States, Japan."""
    return f"the {country}" if country in WITH_ARTICLE else country


def capital_question(country: str, form: str = TEST_FORM) -> Question:
    """The question about the capital of `country` in one of the forms."""
    return Question(country, form.format(with_article(country)), CAPITALS[country])


def questions_of(facts: Mapping[str, tuple[str, ...]]) -> list[Question]:
    """The questions of GENERAL or EVERYDAY."""
    return [Question(text, text, accepted) for text, accepted in facts.items()]


def find_countries(names: Iterable[str]) -> list[str]:
    """The countries of CAPITALS that `names` mean, each once, in the order given.

    Case and accents do not matter, and some common short names are understood.

    Raises:
        UsageError: No name is given, or one is unknown; the sentence offers close names.
    """
    wanted = [name.strip() for name in names if name.strip()]
    if not wanted:
        raise UsageError("forget must name at least one country, such as Japan,France.")
    return list(dict.fromkeys(_find_country(name) for name in wanted))


def _find_country(name: str) -> str:
    known = {plain(country): country for country in CAPITALS} | ALIASES
    key = plain(name).removeprefix("the ")
    if key in known:
        return known[key]
    close = [known[k] for k in difflib.get_close_matches(key, known, n=3, cutoff=0.6)]
    raise UsageError(f"forget must name countries of the quiz, but got {name!r}; {_offer(close)}.")


def _offer(close: Sequence[str]) -> str:
    if close:
        return f"did you mean {' or '.join(dict.fromkeys(close))}?".rstrip("?")
    return f"the quiz has {len(CAPITALS)} of them, such as {', '.join(sorted(CAPITALS)[::16])}"
