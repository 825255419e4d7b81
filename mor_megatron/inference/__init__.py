"""Running trained models: loading, generating, showing what was routed where."""
