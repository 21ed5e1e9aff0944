"""A shop's back office as an environment of several turns: requests about customers and orders, tools on a database, rules.

Judged as in tau-bench (Yao et al. 2024): by what the database holds at the end, so that any way there is right and every other
change is wrong.
"""

import collections
import copy
import json
import random
import re
from typing import Any, Literal, NamedTuple

from data_pipelines.tasks.multi_turn import Step, Turns, tool_methods
from data_pipelines.tasks.task import Problem, Scores, Split, draw
from data_pipelines.tasks.tool_calls import Call, Form, write

_SYSTEM = """You work in the back office of a shop and have tools on its database.
An order can be cancelled, or its quantity changed, while it is pending. A delivered order can be refunded; no other one can.
Leave what these rules forbid as it is, and say so. Change nothing that you are not asked to change.
When all is done, answer in words, without calls."""
_PRICES = {"desk lamp": 35, "office chair": 140, "kettle": 28, "backpack": 62, "headphones": 89, "notebook": 4, "bike lock": 23}
_NAMES = ("Ana Lopez", "Bo Chen", "Cara Smith", "Dan Okafor", "Ella Novak", "Finn Berg", "Gita Rao", "Hans Meyer")
_CITIES = ("Lyon", "Bergen", "Porto", "Graz", "Leeds", "Turin", "Gdansk", "Ghent", "Malmo", "Cork", "Split", "Tartu")
_STATUSES = ("pending", "shipped", "delivered")
# In which state an order must be for a goal to have an effect.
_NEEDS = {"cancel": ("pending",), "quantity": ("pending",), "refund": ("delivered",), "undo": ("pending", "delivered")}
_REQUESTS = {
    "cancel": "cancel {order}",
    "quantity": "change {order} to {quantity} pieces",
    "refund": "refund {order}, which arrived {reason}",
    "undo": "take back {order}: cancel it or, if it was delivered, refund it as unwanted",
    "move": "note that {who} has moved to {city}",
    "order": "order {quantity} pieces of the {product} for {who}",
    "ask": "find out what the pending orders of {who} cost together, and end your answer with that number",
}


class _Level(NamedTuple):
    """goals: how many things are asked. kinds: of which sorts. by_id: whether orders are named by their ids. namesakes: whether
    two customers share a name. forbidden: whether something may be asked that the rules forbid."""

    goals: int
    kinds: tuple[str, ...]
    by_id: bool = False
    namesakes: bool = False
    forbidden: bool = False


_LEVELS = (
    _Level(1, ("cancel", "quantity", "refund"), by_id=True),
    _Level(1, ("cancel", "quantity", "refund", "move", "order")),
    _Level(2, ("cancel", "quantity", "refund", "move", "order", "ask")),
    _Level(2, tuple(_REQUESTS), namesakes=True, forbidden=True),
    _Level(3, tuple(_REQUESTS), namesakes=True, forbidden=True),
)


class _Tools:
    """The tools, and the database that they read and write."""

    def __init__(self, database: dict[str, Any]):
        self._database = database

    def find_customers(self, name: str) -> list[dict]:
        """Finds all customers of a name, with their ids and cities.

        Args:
            name: First and last name.
        """
        return [{"id": key, **row} for key, row in self._database["customers"].items() if row["name"].lower() == name.lower()]

    def list_orders(self, customer_id: str) -> list[dict]:
        """Lists all orders of a customer.

        Args:
            customer_id: The customer's id.
        """
        self._row("customers", customer_id)
        return [{"id": key, **row} for key, row in self._database["orders"].items() if row["customer_id"] == customer_id]

    def get_order(self, order_id: str) -> dict:
        """Shows one order.

        Args:
            order_id: The order's id.
        """
        return self._row("orders", order_id)

    def cancel_order(self, order_id: str) -> dict:
        """Cancels a pending order.

        Args:
            order_id: The order's id.
        """
        order = self._pending(order_id)
        order["status"] = "cancelled"
        return order

    def change_quantity(self, order_id: str, quantity: int) -> dict:
        """Changes the number of pieces of a pending order.

        Args:
            order_id: The order's id.
            quantity: The new number of pieces, 1 or more.
        """
        if quantity < 1:
            raise ValueError(f"quantity must be 1 or more, got {quantity}")
        order = self._pending(order_id)
        order["quantity"] = quantity
        return order

    def refund_order(self, order_id: str, reason: Literal["damaged", "late", "unwanted"]) -> dict:
        """Pays the price of an order back. It does not look at the order's status.

        Args:
            order_id: The order's id.
            reason: Why the customer gets the money back.
        """
        order = self._row("orders", order_id)
        order.update(status="refunded", reason=reason)
        return order

    def place_order(self, customer_id: str, product: str, quantity: int) -> dict:
        """Places a new order for a customer.

        Args:
            customer_id: The customer's id.
            product: Name of the product.
            quantity: Number of pieces, 1 or more.
        """
        self._row("customers", customer_id)
        if product not in _PRICES:
            raise ValueError(f"product must be one of {', '.join(_PRICES)}, got {product[:100]!r}")
        if quantity < 1:
            raise ValueError(f"quantity must be 1 or more, got {quantity}")
        return {"id": _place(self._database, customer_id, product, quantity)}

    def update_city(self, customer_id: str, city: str) -> dict:
        """Changes the city where a customer lives.

        Args:
            customer_id: The customer's id.
            city: The new city.
        """
        customer = self._row("customers", customer_id)
        customer["city"] = city
        return customer

    def _row(self, table: str, key: str) -> dict[str, Any]:
        if key not in self._database[table]:
            raise ValueError(f"there is no {table[:-1]} {key[:100]!r}")
        return self._database[table][key]

    def _pending(self, order_id: str) -> dict[str, Any]:
        order = self._row("orders", order_id)
        if order["status"] != "pending":
            raise ValueError(f"the order {order_id} is {order['status']}; only a pending one can be changed")
        return order


class Shop:
    """The shop as an `Environment`. Difficulty 1 is one request that names the order's id; 5 is three requests, names that two
    customers share, and things that the rules forbid.

    Scores: correct (the database is what was asked for, nothing else was written, and an answer ended the episode, with the
    number if one was asked for), changes (share of the wanted changes that were made; None if nothing was to be changed),
    restraint (share of the changes made that were wanted; 1 if none were made), answer (whether the number is right; None if none
    was asked for), and those of `Turns.scores`.

    Attributes:
      form: how calls are written, see `tool_calls.parse`.
      max_turns: turns at most. The hardest problems take ten with one call a turn.
    """

    name = "shop"
    max_difficulty = len(_LEVELS)

    def __init__(self, form: Form = "lfm2", max_turns: int = 16):
        self.form = form
        self.max_turns = max_turns
        self._turns: Turns | None = None

    def reset(self, seed: int, difficulty: int, split: Split = "train") -> Problem:
        """See `Environment.reset`. The reference has the goals, the database at first and as it should be, and the number asked
        for. What is asked is the goals, whatever else the database holds."""
        problem = draw(self, seed, difficulty, split, lambda rng: _problem(rng, _LEVELS[difficulty - 1]))
        self._reference = problem.reference
        self._database = copy.deepcopy(problem.reference["before"])
        self._turns = Turns(tool_methods(_Tools(self._database)), most=self.max_turns, form=self.form)
        return Problem(
            messages=problem.messages, tools=self._turns.schemas, reference=problem.reference, solution=problem.solution
        )

    def step(self, response: str) -> Step:
        """See `Environment.step`.

        Raises:
          ValueError: it was not reset, or the episode is over.
        """
        return self._episode().step(response)

    def score(self) -> Scores:
        """See `Environment.score` and the class.

        Raises:
          ValueError: it was not reset.
        """
        turns = self._episode()
        before, after, now = (_rows(one) for one in (self._reference["before"], self._reference["after"], self._database))
        wanted, made = after - before, now - before
        right = (wanted & made).total()
        number = self._reference["number"]
        answered = None if number is None else float(_last_number(turns.answer or "") == str(number))
        return {
            "correct": float(now == after and bool((turns.answer or "").strip()) and answered in (None, 1.0)),
            "changes": right / wanted.total() if wanted else None,
            "restraint": right / made.total() if made else 1.0,
            "answer": answered,
            **turns.scores(),
        }

    def _episode(self) -> Turns:
        if self._turns is None:
            raise ValueError("the environment must be reset before its first step")
        return self._turns


def solve(environment: Shop, problem: Problem) -> list[dict[str, Any]]:
    """Plays the episode of a `Shop` to its end, with one call a turn, and returns the whole chat: a worked solution for SFT.

    It knows the goals as data, where a model has to understand them, and finds everything else with the tools.
    """
    chat = list(problem.messages)

    def call(tool: str, **arguments: Any) -> Any:
        response = write([Call(tool, arguments)], environment.form, problem.tools)
        step = environment.step(response)
        chat.extend([{"role": "assistant", "content": response}, *step.messages])
        return json.loads(step.messages[0]["content"])

    said = []
    for goal in problem.reference["goals"]:
        kind = goal["kind"]
        if goal["order_id"]:
            order = {"id": goal["order_id"], **call("get_order", order_id=goal["order_id"])}
        else:
            found = call("find_customers", name=goal["name"])
            (customer,) = (one["id"] for one in found if goal["from"] in (None, one["city"]))
            orders = call("list_orders", customer_id=customer) if kind in (*_NEEDS, "ask") else []
            order = next((one for one in orders if one["product"] == goal["product"]), None)
        if kind in _NEEDS and order["status"] not in _NEEDS[kind]:
            said.append(f"I left the order {order['id']} as it is, because it is {order['status']}.")
        elif kind == "ask":
            costs = [one["price"] * one["quantity"] for one in orders if one["status"] == "pending"]
            said.append(f"The pending orders cost {sum(costs)}")
        elif kind == "move":
            call("update_city", customer_id=customer, city=goal["city"])
        elif kind == "order":
            call("place_order", customer_id=customer, product=goal["product"], quantity=goal["quantity"])
        elif kind == "quantity":
            call("change_quantity", order_id=order["id"], quantity=goal["quantity"])
        elif order["status"] == "pending":
            call("cancel_order", order_id=order["id"])
        else:
            call("refund_order", order_id=order["id"], reason=goal["reason"])
    # The number that was asked for comes last.
    answer = " ".join(["That is done.", *sorted(said, key=lambda text: text[-1].isdigit())])
    environment.step(answer)
    return [*chat, {"role": "assistant", "content": answer}]


def _problem(rng: random.Random, level: _Level) -> tuple[Problem, Any]:
    database = _database(rng, level.namesakes)
    customers = list(database["customers"])
    # The customers of different goals are different; the first two are namesakes where there are any.
    about = rng.sample(customers[: max(level.goals, 2)], level.goals)
    kinds = rng.sample(level.kinds, level.goals)
    goals = [
        # Something always is to be done: the first goal is allowed.
        _goal(rng, database, customer, kind, level, allowed=index == 0 or not level.forbidden)
        for index, (customer, kind) in enumerate(zip(about, kinds, strict=True))
    ]
    before = copy.deepcopy(database)
    numbers = [_apply(database, goal, customer) for goal, customer in zip(goals, about, strict=True)]
    reference = {
        "goals": goals,
        "before": before,
        "after": database,
        "number": next((number for number in numbers if number is not None), None),
    }
    requests = [f"{chr(ord('a') + index)}) {_request(goal)}" for index, goal in enumerate(goals)]
    text = f"Please {_request(goals[0])}." if len(goals) == 1 else "Please do this:\n" + "\n".join(requests)
    messages = [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": text}]
    return Problem(messages=messages, reference=reference), sorted(goals, key=repr)


def _database(rng: random.Random, namesakes: bool) -> dict[str, Any]:
    """Customers, each with two to four orders of different products."""
    count = rng.randint(4, 6)
    names, cities = rng.sample(_NAMES, count), rng.sample(_CITIES, count)
    if namesakes:
        names[1] = names[0]
    database: dict[str, Any] = {"customers": {}, "orders": {}}
    for index, (name, city) in enumerate(zip(names, cities, strict=True)):
        database["customers"][f"C{101 + index}"] = {"name": name, "city": city}
    owners = [customer for customer in database["customers"] for _ in range(rng.randint(2, 4))]
    products = {customer: rng.sample(list(_PRICES), len(_PRICES)) for customer in database["customers"]}
    rng.shuffle(owners)  # or an order's id would tell its customer
    for customer in owners:
        order = _place(database, customer, products[customer].pop(), rng.randint(1, 5))
        database["orders"][order]["status"] = rng.choice(_STATUSES)
    return database


def _place(database: dict[str, Any], customer: str, product: str, quantity: int) -> str:
    """Adds an order and returns its id."""
    key = f"O{1001 + len(database['orders'])}"
    database["orders"][key] = {
        "customer_id": customer, "product": product, "quantity": quantity, "price": _PRICES[product], "status": "pending",
        "reason": None,
    }  # fmt: skip
    return key


def _goal(
    rng: random.Random, database: dict[str, Any], customer: str, kind: str, level: _Level, allowed: bool
) -> dict[str, Any]:
    """What is asked, as data. allowed: the order is, or is made, such that the rules allow it."""
    row = database["customers"][customer]
    shared = sum(one["name"] == row["name"] for one in database["customers"].values()) > 1
    goal = {
        "kind": kind, "name": row["name"], "from": row["city"] if shared else None, "order_id": None, "product": None,
        "quantity": None, "reason": None, "city": None,
    }  # fmt: skip
    owned = {key: order for key, order in database["orders"].items() if order["customer_id"] == customer}
    if kind in _NEEDS:
        key = rng.choice(list(owned))
        if allowed and owned[key]["status"] not in _NEEDS[kind]:
            owned[key]["status"] = rng.choice(_NEEDS[kind])
        goal |= {"product": owned[key]["product"], "order_id": key if level.by_id else None}
        goal["reason"] = {"refund": rng.choice(("damaged", "late")), "undo": "unwanted"}.get(kind)
        if kind == "quantity":
            goal["quantity"] = owned[key]["quantity"] + rng.randint(1, 20)
    elif kind == "move":
        taken = {one["city"] for one in database["customers"].values()}
        goal["city"] = rng.choice([city for city in _CITIES if city not in taken])
    elif kind == "order":
        new = [product for product in _PRICES if product not in {order["product"] for order in owned.values()}]
        goal |= {"product": rng.choice(new), "quantity": rng.randint(1, 30)}
    return goal


def _request(goal: dict[str, Any]) -> str:
    who = goal["name"] if goal["from"] is None else f"{goal['name']} from {goal['from']}"
    order = f"the order {goal['order_id']}" if goal["order_id"] else f"the order of {who} for the {goal['product']}"
    return _REQUESTS[goal["kind"]].format(**goal | {"who": who, "order": order})


def _apply(database: dict[str, Any], goal: dict[str, Any], customer: str) -> int | None:
    """Makes the database what it should be, by the rules and without the tools. Returns the number that was asked for, if any."""
    owned = [order for order in database["orders"].values() if order["customer_id"] == customer]
    if goal["kind"] == "ask":
        return sum(order["price"] * order["quantity"] for order in owned if order["status"] == "pending")
    if goal["kind"] == "move":
        database["customers"][customer]["city"] = goal["city"]
    elif goal["kind"] == "order":
        _place(database, customer, goal["product"], goal["quantity"])
    else:
        (order,) = (order for order in owned if order["product"] == goal["product"])
        if order["status"] in _NEEDS[goal["kind"]]:
            if goal["kind"] == "quantity":
                order["quantity"] = goal["quantity"]
            elif order["status"] == "pending":
                order["status"] = "cancelled"
            else:
                order.update(status="refunded", reason=goal["reason"])
    return None


def _rows(database: dict[str, Any]) -> collections.Counter:
    """The database as a bag of rows. Orders have no ids there: new ones may be placed in any order."""
    customers = [[key, *row.values()] for key, row in database["customers"].items()]
    return collections.Counter(json.dumps(row) for row in [*customers, *map(list, map(dict.values, database["orders"].values()))])


def _last_number(text: str) -> str:
    """The last number of a text, without separators and decimals that are zero; "" if there is none."""
    numbers = re.findall(r"\d+(?:\.\d+)?", text.replace(",", ""))
    return re.sub(r"\.0+$", "", numbers[-1]) if numbers else ""
