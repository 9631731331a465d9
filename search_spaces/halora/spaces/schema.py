"""The JSON Schema of a sweep file, for editors; `halora sweep validate` checks more than a schema can say."""

import re
from typing import Any

from halora.hardware.noise_settings import noise_fields
from halora.settings.trial import TrialConfig
from halora.spaces.mistakes import ANY_NAME, field_paths
from halora.spaces.search import METRICS, Constraint
from halora.spaces.sweep import SweepConfig


def sweep_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a sweep file, with the fields of a trial and of its chip."""
    schema, trial = SweepConfig.model_json_schema(), TrialConfig.model_json_schema()
    definitions = trial.pop("$defs")
    for part in (trial, *definitions.values()):  # a preset or a searched field gives what is left out
        part.pop("required", None)
    chip = definitions["Chip"]["properties"]
    chip["noise"] = {"type": "object", "properties": {name: {} for name in noise_fields()}}  # each kind has its own
    chip["preset"] = {"type": "string", "description": "The chip that this one changes."}
    definitions["ChipSetting"] = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Chip"}]}
    trial["properties"]["chip"] = {"$ref": "#/$defs/ChipSetting"}
    definitions["Trial"] = trial
    definitions["Constraint"] = {
        "type": "string",
        "description": Constraint.__doc__,
        "pattern": rf"^\s*({'|'.join(METRICS)})\s*(<=|>=)\s*[-+\d.eE]+\s*$",
    }
    plain = [path for path in field_paths(TrialConfig) if ANY_NAME not in path]
    named = [re.escape(path).replace(ANY_NAME, r"[\w-]+") for path in field_paths(TrialConfig) if ANY_NAME in path]
    paths = {"anyOf": [{"enum": sorted(plain)}, {"pattern": f"^({'|'.join(named)})$"}]}
    properties = schema["properties"]
    properties["trial"] |= {"$ref": "#/$defs/Trial"}
    properties["chips"]["additionalProperties"] = {"$ref": "#/$defs/ChipSetting"}
    properties["space"]["propertyNames"] = paths
    properties["derived"]["propertyNames"] = paths
    properties["first"]["items"] |= {"propertyNames": paths}
    properties["trial"].pop("additionalProperties", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "$defs": {**schema["$defs"], **definitions},
    }
