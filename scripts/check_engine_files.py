#!/usr/bin/env python3
"""Checks recipes/engines/*.yaml against the schemas that the engines publish.

Finds unknown keys, wrong types and wrong choices.

    python3 scripts/check_engine_files.py --crds FOLDER [--skypilot SCHEMAS.py]

FOLDER holds the custom resource definitions as their projects publish them. Their files may have
any names:
  kubernetes-sigs/jobset  config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml
  kubeflow/trainer        manifests/base/crds/trainer.kubeflow.org_{trainjobs,trainingruntimes}.yaml
SCHEMAS.py is sky/utils/schemas.py of SkyPilot's package; without it the installed package is used.

Needs pyyaml and jsonschema. A file without a schema is named and makes the
check fail.
"""

import argparse
import copy
import pathlib
import sys

import jsonschema
import yaml

HERE = pathlib.Path(__file__).resolve().parent.parent / "recipes/engines"


def strict(schema):
    """The schema as `kubectl --validate=strict` reads it: keys that it does not name are errors."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    if schema.pop("x-kubernetes-int-or-string", False):
        schema.pop("type", None)
        schema["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        schema["type"] = [schema["type"], "null"]
    properties = schema.get("properties")
    if isinstance(properties, dict) and not schema.get("x-kubernetes-preserve-unknown-fields"):
        schema.setdefault("additionalProperties", False)
    return schema


def definitions(folder):
    found = {}
    for path in sorted(pathlib.Path(folder).rglob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if not isinstance(document, dict) or document.get("kind") != "CustomResourceDefinition":
                continue
            spec = document["spec"]
            for version in spec["versions"]:
                schema = strict(copy.deepcopy(version["schema"]["openAPIV3Schema"]))
                schema["properties"]["metadata"] = {"type": "object"}
                found[f"{spec['group']}/{version['name']}", spec["names"]["kind"]] = schema
    return found


def skypilot_schema(path):
    if path is None:
        from sky.utils import schemas

        return schemas.get_task_schema()
    scope = {"__name__": "schemas"}
    code = compile(pathlib.Path(path).read_text(), path, "exec")
    exec(code, scope)  # noqa: S102 - the user's own file
    return scope["get_task_schema"]()


def problems(document, schema):
    for error in jsonschema.Draft7Validator(schema).iter_errors(document):
        yield f"{'/'.join(map(str, error.absolute_path)) or 'document'}: {error.message[:300]}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--crds", required=True)
    parser.add_argument("--skypilot")
    options = parser.parse_args()
    known = definitions(options.crds)
    wrong = checked = 0
    for path in sorted(HERE.glob("*.yaml")):
        for document in yaml.safe_load_all(path.read_text()):
            if path.name == "skypilot.yaml":
                name, schema = "task", skypilot_schema(options.skypilot)
            else:
                name = document["kind"]
                schema = known.get((document["apiVersion"], name))
            if schema is None:
                found = [f"no schema of {document['apiVersion']} {name}"]
            else:
                found = list(problems(document, schema))
            checked += 1
            wrong += bool(found)
            print(f"{path.name}: {name}: {'wrong' if found else 'as its schema says'}")
            for problem in found:
                print(f"  {problem}")
    print(f"{checked - wrong} passed, {wrong} failed")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
