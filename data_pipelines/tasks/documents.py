"""Documents to extract from: invoices, support tickets and case notes, made up, each with the record that is in it."""

import datetime
import random
from collections.abc import Callable
from typing import Any, NamedTuple

_FIRST = ("Ada", "Bruno", "Carla", "Dmitri", "Esther", "Felix", "Greta", "Hugo", "Ines", "Jamal", "Kira", "Leon", "Mina", "Noor")
_LAST = ("Adler", "Baptiste", "Castro", "Dvorak", "Eriksen", "Fontaine", "Gupta", "Hansen", "Ito", "Jansen", "Kowalski", "Lopez")
_COMPANIES = ("Northwind", "Bluebird", "Cedar & Sons", "Oakline", "Harbour", "Summit", "Riverside", "Granite", "Lumen", "Atlas")
_FORMS = ("Ltd", "GmbH", "Inc.", "S.A.", "Co-operative")
_CITIES = ("Lyon", "Porto", "Leeds", "Graz", "Ghent", "Turin", "Malmo", "Cork", "Basel", "Gdansk")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December",
)  # fmt: skip


class Document(NamedTuple):
    """text: the document. record: what is in it, a value of JSON that keeps to its kind's schema (`SCHEMAS`)."""

    text: str
    record: dict[str, Any]


def _nullable(kind: str, description: str, **rest: Any) -> dict[str, Any]:
    return {"type": [kind, "null"], "description": description, **rest}


def _object(**properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _text(description: str, **rest: Any) -> dict[str, Any]:
    return {"type": "string", "description": description, **rest}


def _list(items: dict[str, Any], description: str) -> dict[str, Any]:
    return {"type": "array", "items": items, "description": description}


_DATE = {"pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}

_INVOICE = _object(
    invoice_number=_text("of this invoice"),
    date=_text("of the invoice, as YYYY-MM-DD", **_DATE),
    due_date=_nullable("string", "until when it is to be paid, as YYYY-MM-DD", **_DATE),
    seller=_text("the company that sends it"),
    buyer=_object(name=_text("the company or person that pays"), city=_nullable("string", "where the buyer is")),
    items=_list(
        _object(
            description=_text("without the article number"),
            quantity={"type": "integer"},
            unit_price={"type": "number", "description": "of one, without the currency"},
        ),
        "in the order of the invoice",
    ),
    currency={"type": "string", "enum": ["EUR", "GBP", "USD"]},
    total={"type": "number", "description": "the sum that is to be paid"},
)

_TICKET = _object(
    ticket_id=_text("of this ticket"),
    customer=_object(name=_text("first and last name"), email=_nullable("string", "to write back to")),
    product=_text("without its version"),
    version=_nullable("string", "of the product, digits and dots only"),
    priority={"type": "string", "enum": ["low", "normal", "high", "urgent"]},
    error_codes=_list(_text("as it is written"), "of this problem, in the order in which they are named; may be empty"),
    order_number=_nullable("string", "of the purchase"),
)

_CASE_NOTE = _object(
    patient=_object(age={"type": "integer"}, sex={"type": "string", "enum": ["female", "male"]}),
    complaint=_text("what the patient comes for, in the words of the note"),
    duration_days=_nullable("integer", "for how many days the complaint has lasted"),
    vitals=_object(
        heart_rate=_nullable("integer", "beats per minute, today"),
        temperature=_nullable("number", "degrees Celsius, today"),
        systolic=_nullable("integer", "mmHg, today"),
        diastolic=_nullable("integer", "mmHg, today"),
    ),
    medications=_list(
        _object(name=_text("of the drug"), dose_mg={"type": "number"}, times_a_day={"type": "integer"}),
        "those that the patient takes now, in the order of the note; may be empty",
    ),
    allergies=_list(_text("a substance"), "in the order of the note; may be empty"),
    follow_up_days=_nullable("integer", "in how many days the patient is to come again"),
)


def _person(rng: random.Random) -> str:
    return f"{rng.choice(_FIRST)} {rng.choice(_LAST)}"


def _company(rng: random.Random) -> str:
    return f"{rng.choice(_COMPANIES)} {rng.choice(_FORMS)}"


def _code(rng: random.Random, prefixes: tuple[str, ...]) -> str:
    return f"{rng.choice(prefixes)}-{rng.randrange(1000, 100000)}"


def _written(date: datetime.date, rng: random.Random) -> str:
    """A date in words or, where that is clear, in digits."""
    month = _MONTHS[date.month - 1]
    forms = [f"{date.day} {month} {date.year}", f"{month} {date.day}, {date.year}", date.isoformat()]
    return rng.choice([*forms, f"{date.day:02}.{date.month:02}.{date.year}"] if date.day > 12 else forms)


def _maybe(rng: random.Random, difficulty: int, value: Any) -> Any:
    """From difficulty 2 on what may be missing is missing in a third of the documents."""
    return None if difficulty >= 2 and rng.random() < 1 / 3 else value


def invoice(rng: random.Random, difficulty: int) -> Document:
    """1 to 2 items at difficulty 1, up to 2 more at each after it; then other dates, an older invoice, a balance, a discount."""
    date = datetime.date(2019, 1, 1) + datetime.timedelta(days=rng.randrange(2500))
    due = _maybe(rng, difficulty, date + datetime.timedelta(days=rng.choice((14, 21, 30, 45))))
    currency, mark = rng.choice((("EUR", "€"), ("GBP", "£"), ("USD", "$")))
    goods = rng.sample(_GOODS, rng.randrange(1, 2 * difficulty + 1))
    items = [(description, rng.randrange(1, 25), rng.randrange(95, 50000)) for description in goods]
    total = sum(quantity * cents for _, quantity, cents in items)
    discount = total * rng.choice((5, 10, 20)) // 100 if difficulty >= 3 and rng.random() < 0.5 else 0
    buyer = {"name": rng.choice((_person, _company))(rng), "city": _maybe(rng, difficulty, rng.choice(_CITIES))}
    record = {
        "invoice_number": _code(rng, ("INV", "RE", "F")), "date": date.isoformat(), "due_date": due and due.isoformat(),
        "seller": _company(rng), "buyer": buyer,
        "items": [{"description": what, "quantity": many, "unit_price": cents / 100} for what, many, cents in items],
        "currency": currency, "total": (total - discount) / 100,
    }  # fmt: skip
    money = lambda cents: f"{mark}{cents // 100:,}.{cents % 100:02}"
    lines = [record["seller"], f"Invoice {record['invoice_number']}", f"Date: {_written(date, rng)}"]
    lines.append(f"Bill to: {buyer['name']}{', ' + buyer['city'] if buyer['city'] else ''}")
    if difficulty >= 2:
        delivered = date - datetime.timedelta(days=rng.randrange(1, 9))
        lines.insert(rng.randrange(1, 4), f"Delivered on {_written(delivered, rng)}, order {_code(rng, ('PO', 'A'))}")
    if difficulty >= 3:
        lines.append(f"This replaces invoice {_code(rng, ('INV', 'RE', 'F'))}.")
    lines.append("")
    for what, many, cents in items:
        article = f"[{rng.randrange(100, 1000)}] " if difficulty >= 2 else ""
        forms = (f"{many} x {article}{what} at {money(cents)}", f"{article}{what}, {many} pcs, {money(cents)} each")
        lines.append(rng.choice(forms))
    lines.append("")
    if discount:
        lines += [f"Subtotal {money(total)}", f"Discount -{money(discount)}"]
    lines.append(f"{rng.choice(('Total', 'Amount due', 'To be paid'))}: {money(total - discount)}")
    if due:
        lines.append(f"{rng.choice(('Please pay by', 'Due on', 'Payable until'))} {_written(due, rng)}.")
    if difficulty >= 3:
        lines.append(f"Balance of your last statement: {money(rng.randrange(100, 100000))} (paid, thank you).")
    return Document("\n".join(lines), record)


_GOODS = (
    "desk lamp", "office chair", "paper A4", "printer toner", "whiteboard", "cable 2 m", "keyboard", "monitor arm",
    "filing cabinet", "coffee filter", "first-aid kit", "label roll", "shelf, oak", "extension lead", "wall clock", "soap 5 l",
)  # fmt: skip
_PRODUCTS = ("Orbit Router", "PixelCam", "NoteSync", "FleetTrack", "VoltMeter Pro", "ShopDesk", "AquaPump", "CloudPrint")
_TROUBLES = (
    "does not start after the update", "loses the connection every few minutes", "shows a blank screen", "is very slow",
    "cannot save files", "asks for the password again and again", "makes a loud noise",
)  # fmt: skip
_PRIORITIES = {
    "low": ("There is no hurry at all.", "Whenever you have time."),
    "normal": ("Please have a look in the next days.", "An answer this week would be fine."),
    "high": ("We need this solved by tomorrow.", "This is important to us, please be quick."),
    "urgent": ("Everything stands still, we need help this minute!", "This is an emergency, please call at once!"),
}


def ticket(rng: random.Random, difficulty: int) -> Document:
    """At difficulty 1 a form with all fields; then a letter, with an older ticket, a colleague, another product."""
    name = _person(rng)
    address = f"{name.lower().replace(' ', rng.choice('._'))}@{rng.choice(('example', 'mail'))}.org"
    product, other = rng.sample(_PRODUCTS, 2)
    codes = [f"E{rng.randrange(100, 1000)}" for _ in range(rng.randrange(0, difficulty + 1))]
    record = {
        "ticket_id": _code(rng, ("T", "SUP", "CASE")),
        "customer": {"name": name, "email": _maybe(rng, difficulty, address)},
        "product": product,
        "version": _maybe(rng, difficulty, f"{rng.randrange(1, 9)}.{rng.randrange(20)}.{rng.randrange(10)}"),
        "priority": rng.choice(tuple(_PRIORITIES)),
        "error_codes": list(dict.fromkeys(codes)),
        "order_number": _maybe(rng, difficulty, str(rng.randrange(100000, 10000000))),
    }
    write = _ticket_form if difficulty == 1 else _ticket_letter
    return Document(write(rng, difficulty, record, other), record)


def _ticket_form(rng: random.Random, difficulty: int, record: dict[str, Any], other: str) -> str:
    lines = [
        f"Name: {record['customer']['name']}",
        f"E-mail: {record['customer']['email']}",
        f"Product: {record['product']} {record['version']}",
        f"Priority: {record['priority']}",
        f"Order: {record['order_number']}",
        f"Error codes: {', '.join(record['error_codes']) or 'none'}",
        f"Message: It {rng.choice(_TROUBLES)}.",
    ]
    rng.shuffle(lines)
    return "\n".join([f"Ticket {record['ticket_id']}", *lines])


def _ticket_letter(rng: random.Random, difficulty: int, record: dict[str, Any], other: str) -> str:
    version = f" (version {record['version']})" if record["version"] else ""
    sentences = [f"Hello, our {record['product']}{version} {rng.choice(_TROUBLES)}."]
    if record["error_codes"]:
        sentences.append(f"It shows {' and then '.join(record['error_codes'])}.")
    if record["order_number"]:
        sentences.append(f"We bought it with order {record['order_number']}.")
    beside = [
        f"A colleague, {_person(rng)}, had something like it in ticket {_code(rng, ('T', 'SUP', 'CASE'))}.",
        f"The {other} {rng.randrange(1, 9)}.{rng.randrange(20)} that stands beside it works well.",
        f"Last year it was E{rng.randrange(100, 1000)}, and that has been solved.",
    ]
    for sentence in rng.sample(beside, min(difficulty - 1, len(beside))):
        sentences.insert(rng.randrange(1, len(sentences) + 1), sentence)
    sentences.append(rng.choice(_PRIORITIES[record["priority"]]))
    header = [f"Ticket: {record['ticket_id']}", f"From: {record['customer']['name']}"]
    if record["customer"]["email"]:
        header[1] += f" <{record['customer']['email']}>"
    return "\n".join([*header, "", " ".join(sentences), "", "Regards", record["customer"]["name"]])


_COMPLAINTS = (
    "a dry cough", "pain in the left knee", "headache", "a rash on both arms", "dizziness when standing up", "lower back pain",
    "a sore throat", "heartburn after meals", "trouble falling asleep",
)  # fmt: skip
_DRUGS = (
    ("metformin", (500, 850)), ("lisinopril", (5, 10, 20)), ("ibuprofen", (200, 400)), ("omeprazole", (20, 40)),
    ("levothyroxine", (0.05, 0.1)), ("amlodipine", (5, 10)), ("sertraline", (50, 100)), ("warfarin", (2.5, 5)),
)  # fmt: skip
_TIMES = {1: "once a day", 2: "twice a day", 3: "three times a day"}
_SUBSTANCES = ("penicillin", "latex", "peanuts", "aspirin", "pollen", "sulfonamides")


def case_note(rng: random.Random, difficulty: int) -> Document:
    """At difficulty 1 all is there; then values of earlier visits, drugs that were stopped and those of relatives."""
    age, sex = rng.randrange(18, 95), rng.choice(("female", "male"))
    drugs = rng.sample(_DRUGS, rng.randrange(0, difficulty + 1) + 2)
    taken = [
        {"name": name, "dose_mg": rng.choice(doses), "times_a_day": rng.choice((1, 2, 3))} for name, doses in drugs[:-2]
    ]
    pressure = _maybe(rng, difficulty, (rng.randrange(95, 180), rng.randrange(55, 95))) or (None, None)
    record = {
        "patient": {"age": age, "sex": sex},
        "complaint": rng.choice(_COMPLAINTS),
        "duration_days": _maybe(rng, difficulty, rng.choice((*range(2, 15), 21, 28))),
        "vitals": {
            "heart_rate": _maybe(rng, difficulty, rng.randrange(52, 125)),
            "temperature": _maybe(rng, difficulty, rng.randrange(358, 402) / 10),
            "systolic": pressure[0],
            "diastolic": pressure[1],
        },
        "medications": taken,
        "allergies": rng.sample(_SUBSTANCES, rng.randrange(0, min(difficulty, 3) + 1)),
        "follow_up_days": _maybe(rng, difficulty, rng.choice((3, 7, 10, 14, 28))),
    }
    return Document(_note(rng, difficulty, record, [name for name, _ in drugs[-2:]]), record)


def _note(rng: random.Random, difficulty: int, record: dict[str, Any], others: list[str]) -> str:
    patient, vitals = record["patient"], record["vitals"]
    who, they = ("woman", "She") if patient["sex"] == "female" else ("man", "He")
    days = record["duration_days"]
    lasted = "" if days is None else f" for {days // 7} weeks" if days % 7 == 0 and days > 7 else f" for {days} days"
    lines = [f"{patient['age']}-year-old {who} with {record['complaint']}{lasted}."]
    today = []
    if vitals["heart_rate"]:
        today.append(f"pulse {vitals['heart_rate']}")
    if vitals["temperature"]:
        today.append(f"temperature {vitals['temperature']}")
    if vitals["systolic"]:
        today.append(f"blood pressure {vitals['systolic']}/{vitals['diastolic']}")
    lines.append(f"Today: {', '.join(today)}." if today else "No vital signs were taken today.")
    drugs = [f"{drug['name']} {drug['dose_mg']} mg {_TIMES[drug['times_a_day']]}" for drug in record["medications"]]
    lines.append(f"{they} takes {', '.join(drugs)}." if drugs else f"{they} takes no medication.")
    allergies = " and ".join(record["allergies"])
    lines.append(f"Allergic to {allergies}." if allergies else "No known allergies.")
    beside = [
        f"At the last visit the pulse was {rng.randrange(50, 120)} and the temperature {rng.randrange(360, 400) / 10}.",
        f"{others[0].capitalize()} was stopped last year.",
        f"A brother takes {others[1]} and is allergic to {rng.choice(_SUBSTANCES)}.",
    ]
    for sentence in rng.sample(beside, difficulty - 1):
        lines.insert(rng.randrange(1, len(lines) + 1), sentence)
    if record["follow_up_days"]:
        lines.append(f"Comes again in {record['follow_up_days']} days.")
    return " ".join(lines)


SCHEMAS = {"invoice": _INVOICE, "ticket": _TICKET, "case_note": _CASE_NOTE}
KINDS: dict[str, Callable[[random.Random, int], Document]] = {"invoice": invoice, "ticket": ticket, "case_note": case_note}
