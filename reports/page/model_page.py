"""The page of a model that need not be there: `profile -m MODEL --device NAME -o report.html`. All of it is predicted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import device_rows
from .charts import Tile
from .render import render

NAV = (("devices", "Devices"), ("memory", "Memory"))


def model_html(prediction: Mapping[str, Any]) -> str:
    """The page of the JSON form of a prediction (`commands.predict.Prediction`)."""
    found = list(device_rows.predicted(prediction))
    devices = len({r.device for r in found})
    targets = list(dict.fromkeys(r.target for r in found))
    name = str(prediction["model"]).rstrip("/").rpartition("/")[2]
    tiles = [
        Tile(f"{prediction['bits']:g} bits", "a weight, of all that can be quantized", "counted"),
        Tile(str(devices), f"device{'s' * (devices != 1)}, by {', '.join(targets)}", "counted"),
    ]
    if (best := device_rows.fastest(found, "predicted")) is not None:
        tiles.append(best)
    values = {
        "title": name,
        "what": "prediction",
        "lead": f"{prediction['model']}, before it is compiled: what its decode steps and prompts would cost.",
        "nav": NAV,
        "assumptions": prediction["assumptions"],
        "tiles": tiles,
        "context": prediction["context"],
        "spans": device_rows.spans(found),
        "rates": device_rows.table(found),
        "rate_notes": device_rows.notes(found),
        "memory": device_rows.memory(prediction),
    }
    return render("model.html.j2", values)
