"""The definition of a project's CI jobs: parsed, validated, described to editors as JSON Schema."""
