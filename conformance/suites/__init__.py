"""The suites as pytest tests: `pytest --pyargs conformance.suites --subject my_module:kernel`."""
