"""Single-turn tool use: a request, the schemas of some functions, and the calls that answer it: one, several, or none."""

import dataclasses
import functools
import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from data_pipelines.tasks.task import Problem, Scores, Split, draw
from data_pipelines.tasks.tool_calls import Call, Form, parse, score_calls, write

_SYSTEM = "Call the functions that the request needs, with the arguments it names. Where none of them fits, say so in words."
_NONE_FITS = "I'm afraid none of the functions that I have can do that."
_JOINS = ("Also: ", "And then: ", "One more thing: ", "Besides: ")
_NO_DEFAULT = object()


class _Level(NamedTuple):
    """functions: how many are offered. calls: how many are wanted. optional: the share of optional arguments that the request
    names. none: the share of requests that none of the functions can answer. related: whether the others are taken from the
    same domains first."""

    functions: int
    calls: int
    optional: float
    none: float
    related: bool


_LEVELS = (
    _Level(functions=1, calls=1, optional=0.0, none=0.0, related=False),
    _Level(functions=3, calls=1, optional=0.5, none=0.15, related=False),
    _Level(functions=6, calls=1, optional=0.7, none=0.2, related=True),
    _Level(functions=6, calls=2, optional=0.7, none=0.1, related=True),
    _Level(functions=10, calls=3, optional=0.8, none=0.1, related=True),
)


class _Argument(NamedTuple):
    """draw: a value from a generator. phrase: what the request says of an optional argument's value, which stands for {}."""

    schema: dict[str, Any]
    draw: Callable[[random.Random], Any]
    default: Any = _NO_DEFAULT
    phrase: str = ""


class _Function(NamedTuple):
    """request: what somebody says who wants it called; it names all required arguments."""

    domain: str
    name: str
    description: str
    request: str
    arguments: dict[str, _Argument]


def _one_of(*values: Any) -> Callable[[random.Random], Any]:
    return lambda rng: rng.choice(values)


def _some_of(*values: Any) -> Callable[[random.Random], list]:
    return lambda rng: rng.sample(values, rng.randint(1, min(3, len(values))))


def _integer(low: int, high: int) -> Callable[[random.Random], int]:
    return lambda rng: rng.randint(low, high)


def _decimal(low: float, high: float, places: int) -> Callable[[random.Random], float]:
    return lambda rng: round(rng.uniform(low, high), places)


def _date(rng: random.Random) -> str:
    return f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"


def _time(rng: random.Random) -> str:
    return f"{rng.randint(6, 22):02}:{rng.choice((0, 15, 30, 45)):02}"


def _items(rng: random.Random) -> list[dict[str, Any]]:
    products = ("apples", "bread rolls", "lightbulbs", "notebooks", "oat milk", "pasta", "soap", "tea")
    products = rng.sample(products, rng.randint(1, 3))
    return [{"product": product, "quantity": rng.randint(1, 12)} for product in products]


def _note(rng: random.Random) -> str:
    """A text with what trips a parser: quotes, brackets, line ends, backslashes."""
    person = rng.choice(("Tom", "Amira", "Jo"))
    return rng.choice(
        (
            f"Ask {person} about the \"Q{rng.randint(1, 4)}\" figures [draft {rng.randint(1, 9)}], it's urgent",
            f"{person}'s files are in C:\\shared\\{rng.randint(2019, 2026)}\\",
            f"call {person} (room {rng.randint(100, 999)}), then reply",
            f"to buy:\n- {rng.randint(2, 9)} chairs\n- a desk for {person}",
        )
    )  # fmt: skip


_CITIES = ("Paris", "Nairobi", "São Paulo", "Osaka", "Leeds", "Cape Town", "Tromsø", "Quito", "Perth", "Zürich", "Austin", "Lima")
_PEOPLE = ("Amira", "Ben", "Chiara", "Dev", "Eva", "Farid", "Grace", "Hugo")
_ROOMS = ("kitchen", "bedroom", "office", "hall", "freezer room")
_CURRENCIES = ("EUR", "USD", "GBP", "JPY", "CHF", "INR")


def _text(description: str, **more: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **more}


def _whole(description: str) -> dict[str, Any]:
    return {"type": "integer", "description": description}


def _number(description: str) -> dict[str, Any]:
    return {"type": "number", "description": description}


def _flag(description: str) -> dict[str, Any]:
    return {"type": "boolean", "description": description}


def _list(description: str) -> dict[str, Any]:
    return {"type": "array", "items": {"type": "string"}, "description": description}


_ITEM_SCHEMA = {
    "type": "array",
    "description": "What to order.",
    "items": {
        "type": "object",
        "properties": {"product": {"type": "string"}, "quantity": {"type": "integer"}},
        "required": ["product", "quantity"],
    },
}
_JOURNEY = {
    "from": _Argument(_text("City of departure."), _one_of(*_CITIES[:6])),
    "to": _Argument(_text("City of arrival."), _one_of(*_CITIES[6:])),
    "date": _Argument(_text("Day of departure, YYYY-MM-DD."), _date),
    "passengers": _Argument(_whole("Number of travellers."), _integer(2, 6), 1, "We are {} people."),
}

_FUNCTIONS = (
    _Function("weather", "get_forecast", "Weather forecast for a city.",
        "What will the weather be like in {city} over the next {days} days?", {
        "city": _Argument(_text("Name of the city."), _one_of(*_CITIES)),
        "days": _Argument(_whole("Number of days, 1 to 14."), _integer(2, 14)),
        "unit": _Argument(_text("Unit of temperature.", enum=["celsius", "fahrenheit"]), _one_of("fahrenheit", "celsius"),
            "celsius", "Give it in {}."),
    }),
    _Function("weather", "get_air_quality", "Current air quality of a city.", "How good is the air in {city} on {date}?", {
        "city": _Argument(_text("Name of the city."), _one_of(*_CITIES)),
        "date": _Argument(_text("Day, YYYY-MM-DD."), _date),
        "pollutant": _Argument(_text("One pollutant.", enum=["pm25", "no2", "o3"]), _one_of("pm25", "no2", "o3"), None,
            "I care about {} only."),
    }),
    _Function("calendar", "create_event", "Adds an event to a calendar.", "Add '{title}' to my calendar on {date} at {start}.", {
        "title": _Argument(_text("Title of the event."), _one_of("Budget review", "Dentist", "Team lunch", "Call with legal")),
        "date": _Argument(_text("Day, YYYY-MM-DD."), _date),
        "start": _Argument(_text("Time of its beginning, HH:MM."), _time),
        "minutes": _Argument(_whole("Duration in minutes."), _integer(15, 180), 60, "It takes {} minutes."),
        "attendees": _Argument(_list("Names of those who are invited."), _some_of(*_PEOPLE), [], "Invite {}."),
    }),
    _Function("calendar", "find_events", "Events of a day.", "What is in my calendar on {date}?", {
        "date": _Argument(_text("Day, YYYY-MM-DD."), _date),
        "keyword": _Argument(_text("A word of the title."), _one_of("dentist", "review", "school"), "",
            "Only what has '{}' in its title."),
    }),
    _Function("bank", "transfer_money", "Sends money to a person.", "Send {amount} {currency} to {recipient}.", {
        "recipient": _Argument(_text("Name of the person."), _one_of(*_PEOPLE)),
        "amount": _Argument(_number("Amount of money."), _decimal(1, 900, 2)),
        "currency": _Argument(_text("Code of the currency."), _one_of(*_CURRENCIES)),
        "note": _Argument(_text("A note for the recipient."), _one_of("rent", "lunch, thanks!", "birthday gift"), "",
            "Add the note '{}'."),
    }),
    _Function("bank", "convert_currency", "Converts an amount of money.", "How much is {amount} {from} in {to}?", {
        "amount": _Argument(_number("Amount of money."), _decimal(1, 5000, 2)),
        "from": _Argument(_text("Code of the currency it is in."), _one_of(*_CURRENCIES[:3])),
        "to": _Argument(_text("Code of the currency that is wanted."), _one_of(*_CURRENCIES[3:])),
    }),
    _Function("travel", "search_flights", "Flights between two cities.", "Find flights from {from} to {to} on {date}.",
        _JOURNEY | {
        "cabin": _Argument(_text("Class.", enum=["economy", "business"]), _one_of("business", "economy"), "economy",
            "We want to fly {}."),
    }),
    _Function("travel", "search_trains", "Trains between two cities.", "Find trains from {from} to {to} on {date}.", _JOURNEY),
    _Function("home", "home.set_temperature", "Sets the temperature of a room.", "Set the {room} to {degrees} degrees.", {
        "room": _Argument(_text("Name of the room."), _one_of(*_ROOMS)),
        "degrees": _Argument(_whole("Degrees Celsius; may be negative."), _integer(-20, 25)),
        "until": _Argument(_text("Time when it ends, HH:MM."), _time, None, "Keep it so until {}."),
    }),
    _Function("home", "home.dim_lights", "Dims the lights of a room.", "Dim the lights in the {room} to {percent} percent.", {
        "room": _Argument(_text("Name of the room."), _one_of(*_ROOMS)),
        "percent": _Argument(_whole("Brightness, 0 to 100."), _integer(0, 100)),
        "fade": _Argument(_flag("Whether it happens slowly."), _one_of(True), False, "Do it slowly."),
    }),
    _Function("shop", "place_order", "Orders products from the shop.", "Order {items} from the shop for {day}.", {
        "items": _Argument(_ITEM_SCHEMA, _items),
        "day": _Argument(_text("Day of delivery, YYYY-MM-DD."), _date),
        "express": _Argument(_flag("Whether it is delivered by express."), _one_of(True), False, "By express, please."),
    }),
    _Function("shop", "get_price", "Price of a product in the shop.", "What do {quantity} {product} cost in the shop?", {
        "product": _Argument(_text("Name of the product."), _one_of("apples", "lightbulbs", "notebooks", "soaps")),
        "quantity": _Argument(_whole("How many of it."), _integer(2, 60)),
    }),
    _Function("places", "find_nearby", "Places of a kind near a point.",
        "Is there a {kind} near latitude {latitude}, longitude {longitude}?", {
        "latitude": _Argument(_number("Degrees north; south is negative."), _decimal(-60, 70, 4)),
        "longitude": _Argument(_number("Degrees east; west is negative."), _decimal(-180, 180, 4)),
        "kind": _Argument(_text("Kind of place."), _one_of("pharmacy", "hotel", "café", "petrol station")),
        "radius_km": _Argument(_number("How far away at most."), _decimal(0.5, 20, 1), 5.0, "Not more than {} km away."),
    }),
    _Function("notes", "create_note", "Saves a note.", "Save a note with the title '{title}' and exactly this text:\n{text}\n", {
        "title": _Argument(_text("Title of the note."), _one_of("Reminder", "Office", "Ideas", "Later")),
        "text": _Argument(_text("Text of the note."), _note),
        "tags": _Argument(_list("Tags of the note."), _some_of("work", "home", "urgent", "money"), [], "Tag it with {}."),
    }),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ToolUse:
    """Requests that calls answer; difficulty 1 is one function and one call, 5 is ten functions and three calls.

    A response is scored as `score_calls` does it: correct, format, name, arguments. The accepted values are lists as in BFCL's
    possible answers: an optional argument that the request does not name may be left out or have its default.

    Attributes:
      form: how calls are written, see `tool_calls.parse`.
    """

    form: Form = "lfm2"
    name: str = "tool_use"
    max_difficulty: int = len(_LEVELS)

    def sample(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """See `Task.sample`. What is asked is the calls: their wording and the functions beside them may differ."""
        return draw(self, seed, difficulty, split, functools.partial(self._make, difficulty=difficulty))

    def score(self, response: str, reference: dict[str, Any]) -> Scores:
        """See `Task.score`."""
        tools = reference["tools"]
        return score_calls(parse(response, self.form, tools), reference["calls"], tools)

    def _make(self, rng: random.Random, difficulty: int) -> tuple[Problem, Any]:
        level = _LEVELS[difficulty - 1]
        none = rng.random() < level.none
        functions = _chosen(rng, 1 if none else level.calls)
        requests, calls = [], []
        for function in functions:
            request, arguments = _asked(rng, function, level.optional)
            while (call := Call(function.name, arguments)) in calls:
                request, arguments = _asked(rng, function, level.optional)
            requests.append(request)
            calls.append(call)
        tools = _offered(rng, functions, level, none)
        joins = ["", *rng.sample(_JOINS, len(requests) - 1)]
        wanted = [] if none else [{call.name: _accepted(function, call)} for function, call in zip(functions, calls, strict=True)]
        problem = Problem(
            messages=[
                {"role": "system", "content": _SYSTEM},
                {"role": "user", "content": " ".join(map("".join, zip(joins, requests, strict=True)))},
            ],
            tools=tools,
            reference={"calls": wanted, "tools": tools},
            solution=_NONE_FITS if none else write(calls, self.form, tools),
        )
        return problem, sorted(calls, key=repr)


def _chosen(rng: random.Random, count: int) -> list[_Function]:
    """The functions of the calls: all different, or, in half of the cases, one of them again and again."""
    return [rng.choice(_FUNCTIONS)] * count if rng.random() < 0.5 else rng.sample(_FUNCTIONS, count)


def _asked(rng: random.Random, function: _Function, optional: float) -> tuple[str, dict[str, Any]]:
    """A request and the arguments it names, in the schema's order."""
    arguments, phrases = {}, []
    for key, argument in function.arguments.items():
        if argument.default is _NO_DEFAULT:
            arguments[key] = argument.draw(rng)
        elif rng.random() < optional:
            arguments[key] = argument.draw(rng)
            phrases.append(argument.phrase.format(_shown(arguments[key])))
    # An argument may be called as Python's keywords are, which `format` does not mind.
    request = function.request.format(**{key: _shown(value) for key, value in arguments.items()})
    return " ".join([request, *phrases]), arguments


def _shown(value: Any) -> str:
    """A value as a request names it."""
    if isinstance(value, list):
        parts = [_shown(part) for part in value]
        return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{value['quantity']} {value['product']}" if isinstance(value, dict) else str(value)


def _accepted(function: _Function, call: Call) -> dict[str, list]:
    """The values that are accepted for each argument; "" for one that may be left out."""
    accepted = {}
    for key, argument in function.arguments.items():
        if key in call.arguments:
            accepted[key] = [_by_key(call.arguments[key])]
            # Whoever names the default may as well leave it out.
            accepted[key] += [""] if call.arguments[key] == argument.default else []
        else:
            accepted[key] = [_by_key(argument.default), ""]
    return accepted


def _by_key(value: Any) -> Any:
    """The value with the accepted values of a mapping's keys as lists, as `call_error` takes it."""
    if isinstance(value, list):
        return [_by_key(part) for part in value]
    return {key: [_by_key(part)] for key, part in value.items()} if isinstance(value, dict) else value


def _offered(rng: random.Random, wanted: Sequence[_Function], level: _Level, none: bool) -> list[dict[str, Any]]:
    """The schemas of the wanted functions (not if `none`) and of others, in no order."""
    names = {function.name for function in wanted}
    domains = {function.domain for function in wanted}
    others = [function for function in _FUNCTIONS if function.name not in names]
    rng.shuffle(others)
    if level.related:
        others.sort(key=lambda function: function.domain not in domains)
    offered = [] if none else [function for function in _FUNCTIONS if function.name in names]
    offered += others[: max(level.functions - len(offered), 0)]
    rng.shuffle(offered)
    return [_tool(function) for function in offered]


def _tool(function: _Function) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "properties": {
            # A default of None is none that a schema could name.
            key: argument.schema | ({} if argument.default in (_NO_DEFAULT, None) else {"default": argument.default})
            for key, argument in function.arguments.items()
        },
        "required": [key for key, argument in function.arguments.items() if argument.default is _NO_DEFAULT],
    }
    return {
        "type": "function",
        "function": {"name": function.name, "description": function.description, "parameters": parameters},
    }
