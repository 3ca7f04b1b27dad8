"""Every mistake in the desired state: its place, a caret under it, and the way out, as the command prints them."""

from __future__ import annotations

import re

import pytest

from tests.unit.support import Fleet, reconcile, shown_problems

# Each: name, the file with «what the caret marks», the message and the hint (their beginnings).
MISTAKES = [
    ("unknown_section", "«tolls»: []\n", "unknown section 'tolls'", "did you mean 'tools'?"),
    (
        "unknown_key",
        "tools:\n  - {name: t, nodes: all, «verson»: '1'}\n",
        "unknown key 'verson'",
        "did you mean 'version'?",
    ),
    (
        "unknown_nested_key",
        "tools:\n  - {name: t, nodes: all, install: {«nmp»: x}}\n",
        "unknown key 'nmp'",
        "did you mean 'npm'?",
    ),
    (
        "unknown_key_in_a_table",
        "schema:\n  - {name: d, nodes: all, database: ~/d.db, tables: {t: {columns: {a: TEXT}, «index»: {}}}}\n",
        "unknown key 'index'",
        "did you mean 'indexes'?",
    ),
    (
        "duplicate_key",
        "tools:\n  - name: t\n    nodes: all\n    «name»: u\n",
        "the key 'name' stands here a second time (first in line 2)",
        "",
    ),
    (
        "duplicate_section",
        "tools: []\n«tools»: []\n",
        "the key 'tools' stands here a second time (first in line 1)",
        "",
    ),
    (
        "boolean_where_text_is_meant",
        "tools:\n  - {name: t, nodes: all, version: «on»}\n",
        "version is text, but YAML reads on as true or false",
        'write it in quotes: "on"',
    ),
    (
        "boolean_in_a_list_of_text",
        "tools:\n  - {name: t, nodes: all, version_args: [«yes»]}\n",
        "an item of version_args is text, but YAML reads yes as true or false",
        'write it in quotes: "yes"',
    ),
    (
        "boolean_where_a_mode_is_meant",
        "tools:\n  - {name: t, nodes: all, mode: «off»}\n",
        "mode is text, but YAML reads off as true or false",
        'write it in quotes: "off"',
    ),
    (
        "boolean_as_a_key",
        "services:\n  - {name: s, nodes: all, run: {command: [/s], environment: {«NO»: x}}}\n",
        "the key NO is not text in YAML 1.1",
        'write it in quotes: "NO"',
    ),
    (
        "octal_permissions",
        "wrappers:\n  - {name: w, nodes: all, dest: ~/w, content: x, permissions: «0755»}\n",
        "permissions is text, but YAML reads 0755 as a number",
        'write it in quotes: "0755"',
    ),
    (
        "octal_mode",
        "wrappers:\n  - {name: w, nodes: all, dest: ~/w, content: x, mode: «0755»}\n",
        "mode is text, but YAML reads 0755 as a number",
        'write it in quotes: "0755"',
    ),
    (
        "float_as_a_version",
        "tools:\n  - {name: t, nodes: all, version: «1.10»}\n",
        "version is text, but YAML reads 1.10 as a number",
        'write it in quotes: "1.10"',
    ),
    (
        "sexagesimal_number",
        "tools:\n  - {name: t, nodes: all, version: «1:30»}\n",
        "version is text, but YAML reads 1:30 as a number",
        'write it in quotes: "1:30"',
    ),
    (
        "date_where_text_is_meant",
        "tools:\n  - {name: t, nodes: all, version: «2026-01-02»}\n",
        "version is text, but YAML reads 2026-01-02 as",
        'write it in quotes: "2026-01-02"',
    ),
    (
        "text_where_a_boolean_is_meant",
        "tools:\n  - {name: t, nodes: all, allow_become: «'yes'»}\n",
        "allow_become should be a boolean, this is text",
        "",
    ),
    (
        "unknown_node",
        "tools:\n  - {name: t, nodes: «node-11»}\n",
        "the pattern 'node-11' matches no node of inventory",
        "did you mean 'node-1'?",
    ),
    (
        "one_unknown_node_of_several",
        "tools:\n  - {name: t, nodes: «'node-1,wokers'»}\n",
        "the pattern 'node-1,wokers' matches no node",
        "did you mean 'workers'?",
    ),
    (
        "unknown_excluded_group",
        "tools:\n  - {name: t, nodes: «'all:!mca'»}\n",
        "the pattern 'all:!mca' matches no node",
        "did you mean 'mac'?",
    ),
    (
        "pattern_that_leaves_nothing",
        "tools:\n  - {name: t, nodes: «'macs:!mac'»}\n",
        "the pattern 'macs:!mac' matches no node",
        "these groups and nodes exist, but none is left",
    ),
    ("nodes_missing", "tools:\n  - «{name: t}»\n", "nodes is missing", "an Ansible host pattern"),
    ("name_missing", "tools:\n  - «{nodes: all}»\n", "name is missing", ""),
    (
        "name_of_a_form_that_is_not_allowed",
        "tools:\n  - {name: «a/b», nodes: all}\n",
        "name: 'a/b' has a form that is not allowed",
        "the form is ",
    ),
    (
        "missing_source_file",
        "wrappers:\n  - {name: w, nodes: all, dest: ~/w, src: «files/w.sh»}\n",
        "cannot read 'files/w.sh': No such file or directory",
        "paths are relative to the directory of the desired state",
    ),
    (
        "missing_unit_file",
        "services:\n  - {name: s, nodes: all, unit: «files/s.service»}\n",
        "cannot read 'files/s.service'",
        "paths are relative",
    ),
    (
        "missing_tool_file",
        "tools:\n  - {name: t, nodes: all, install: {file: «files/t»}}\n",
        "cannot read 'files/t'",
        "paths are relative",
    ),
    (
        "no_source_at_all",
        "wrappers:\n  - «{name: w, nodes: all, dest: ~/w}»\n",
        "a wrapper takes exactly one of src, template and content",
        "",
    ),
    (
        "relative_destination",
        "wrappers:\n  - {name: w, nodes: all, dest: «w.sh», content: x}\n",
        "'w.sh' is not absolute",
        "begin with / or ~",
    ),
    (
        "directory_as_destination",
        "wrappers:\n  - {name: w, nodes: all, dest: «~/bin/», content: x}\n",
        "'~/bin/' is a directory",
        "name the file itself",
    ),
    (
        "validation_without_a_place_for_the_file",
        "wrappers:\n  - {name: w, nodes: all, dest: ~/w, content: x, validate: «bash -n»}\n",
        "has no %s",
        "put %s where",
    ),
    (
        "validation_with_an_open_quote",
        'wrappers:\n  - {name: w, nodes: all, dest: ~/w, content: x, validate: «"bash \'x %s"» }\n',
        "cannot be split into words",
        "",
    ),
    (
        "bad_permissions",
        "wrappers:\n  - {name: w, nodes: all, dest: ~/w, content: x, permissions: «'9755'»}\n",
        "permissions: '9755' will not do",
        "write permissions as",
    ),
    (
        "interval_of_nothing",
        "tools:\n  - {name: t, nodes: all, interval: «0s»}\n",
        "interval: '0s' will not do",
        "has to be longer than nothing",
    ),
    (
        "bad_duration",
        "tools:\n  - {name: t, nodes: all, interval: «5 minutes»}\n",
        "interval: '5 minutes' will not do",
        "write a duration such as",
    ),
    (
        "bad_mode",
        "tools:\n  - {name: t, nodes: all, mode: «enforced»}\n",
        "mode may be 'enforce', 'warn' or 'ignore', not 'enforced'",
        "did you mean 'enforce'?",
    ),
    (
        "bad_range",
        "tools:\n  - {name: t, nodes: all, version: «'>=two'»}\n",
        "version: '>=two' will not do",
        "'>=two' is no version range",
    ),
    (
        "wildcard_that_npm_means",
        "tools:\n  - {name: t, nodes: all, version: «2.x»}\n",
        "version: '2.x' will not do",
        "'2.x' is no version range",
    ),
    (
        "bad_regex",
        "tools:\n  - {name: t, nodes: all, version_regex: «'(a'»}\n",
        "is no regular expression",
        "",
    ),
    (
        "regex_without_a_group",
        "tools:\n  - {name: t, nodes: all, version_regex: «a+»}\n",
        "has no group",
        "put the version's part in parentheses",
    ),
    (
        "two_ways_to_install",
        "tools:\n  - {name: t, nodes: all, install: «{npm: a, pip: b}»}\n",
        "takes exactly one of apt, pip",
        "",
    ),
    (
        "url_without_digest",
        "tools:\n  - {name: t, nodes: all, install: «{url: https://example.org/t}»}\n",
        "a url needs its sha256",
        "what is downloaded is checked",
    ),
    (
        "digest_of_another_form",
        "tools:\n  - {name: t, nodes: all, install: {url: https://example.org/t, sha256: «abc»}}\n",
        "sha256: 'abc' will not do",
        "a SHA-256 has 64",
    ),
    (
        "url_of_another_scheme",
        "tools:\n  - {name: t, nodes: all, install: {url: «ftp://example.org/t»}}\n",
        "url: 'ftp://example.org/t' has a form",
        "the form is ^(https?|file)://",
    ),
    (
        "too_few_attempts",
        "tools:\n  - {name: t, nodes: all, max_attempts: «0»}\n",
        "max_attempts: input should be greater than or equal to 1",
        "",
    ),
    (
        "unknown_dependency",
        "tools:\n  - {name: t, nodes: all, depends_on: [«tool/u»]}\n",
        "depends_on: tool/u is not declared on",
        "did you mean 'tool/t'?",
    ),
    (
        "dependency_of_another_form",
        "tools:\n  - {name: t, nodes: all, depends_on: [«jq»]}\n",
        "'jq' names no resource",
        "write KIND/NAME",
    ),
    (
        "unknown_field_to_ignore",
        "wrappers:\n  - {name: w, nodes: all, dest: ~/w, content: x, ignore: [«mod»]}\n",
        "wrapper has no field 'mod' to ignore",
        "did you mean 'mode'?",
    ),
    (
        "columns_that_sqlite_refuses",
        "schema:\n  - {name: d, nodes: all, database: ~/d.db, tables: {t: {columns: «{a: TEXT PRIMARY KEY, b: TEXT PRIMARY KEY}»}}}\n",
        "SQLite refuses these columns",
        "",
    ),
    (
        "two_columns_in_one",
        "schema:\n  - {name: d, nodes: all, database: ~/d.db, tables: {t: {columns: «{a: 'TEXT, b TEXT'}»}}}\n",
        "a declaration contains a comma",
        "",
    ),
    (
        "a_declaration_that_closes_the_table",
        "schema:\n  - {name: d, nodes: all, database: ~/d.db, tables: {t: {columns: «{a: 'TEXT); DROP TABLE t; --'}»}}}\n",
        "SQLite refuses these columns",
        "",
    ),
    (
        "index_over_an_unknown_column",
        "schema:\n  - {name: d, nodes: all, database: ~/d.db, tables: {t: {columns: {a: TEXT}, indexes: {i: «{columns: [b]}»}}}}\n",
        "column 'b' is not declared for table 't'",
        "",
    ),
    (
        "quote_in_a_table_name",
        "schema:\n  - {name: d, nodes: all, database: ~/d.db, tables: {'a\"b': «{columns: {a: TEXT}}»}}\n",
        "",
        "the form is ",
    ),
    (
        "relative_database",
        "schema:\n  - {name: d, nodes: all, database: «d.db», tables: {t: {columns: {a: TEXT}}}}\n",
        "'d.db' is not absolute",
        "begin with / or ~",
    ),
    (
        "two_unit_sources",
        "services:\n  - {name: s, nodes: all, unit: a, run: «{command: [/s]}»}\n",
        "a service takes at most one of unit, unit_template and run",
        "",
    ),
    (
        "relative_program",
        "services:\n  - {name: s, nodes: all, run: {command: «[s]»}}\n",
        "'s' is not absolute",
        "name the program's full path",
    ),
    (
        "two_lines_in_a_unit",
        'services:\n  - {name: s, nodes: all, run: «{command: ["/s", "a\\nb"]}»}\n',
        "a unit file's values have one line each",
        "",
    ),
    (
        "missing_variable",
        "tools:\n  - {name: t, nodes: all, version: «{$var: wanted}»}\n",
        "the node node-1 has no variable 'wanted'",
        "known here: group_names, inventory_hostname",
    ),
    (
        "missing_secret",
        "wrappers:\n  - {name: w, nodes: all, dest: ~/w, content: x, owner: «{$env: NOT_SET_HERE}»}\n",
        "the environment has no NOT_SET_HERE",
        "set it where the reconciler runs",
    ),
    (
        "missing_secret_file",
        "wrappers:\n  - {name: w, nodes: all, dest: ~/w, content: x, owner: «{$file: s.txt}»}\n",
        "cannot read 's.txt': No such file or directory",
        "",
    ),
    (
        "unknown_reference",
        "wrappers:\n  - {name: w, nodes: all, dest: ~/w, content: x, owner: «{$evn: HOME}»}\n",
        "unknown reference '$evn'",
        "did you mean '$env'?",
    ),
    (
        "reference_without_a_name",
        "wrappers:\n  - {name: w, nodes: all, dest: ~/w, content: x, owner: «{$env: [HOME]}»}\n",
        "$env takes a name",
        "",
    ),
    (
        "reference_as_nodes",
        "tools:\n  - {name: t, nodes: «{$var: where}»}\n",
        "nodes is text, this is a mapping",
        "",
    ),
    (
        "suspension_without_reason",
        "tools:\n  - {name: t, nodes: all, suspend: «{owner: me}»}\n",
        "reason is missing",
        "",
    ),
    ("section_that_is_no_list", "tools: «{name: t}»\n", "tools is a list", "begin each tool with a dash"),
    ("entry_that_is_no_mapping", "tools:\n  - «jq»\n", "each entry of tools is a mapping, this is text", ""),
    ("file_that_is_a_list", "«-» tools\n", "a desired-state file is a mapping of sections", ""),
    ("file_that_is_text", "«tools»\n", "a desired-state file is a mapping of sections", ""),
    ("tab", "tools:\n«\t»- name: t\n", "this is not YAML: ", "YAML is indented with spaces, never with tabs"),
    (
        "colon_in_a_value",
        "tools:\n  - name: a«:» b\n",
        "this is not YAML: mapping values are not allowed",
        "put a value that contains a colon in quotes",
    ),
    (
        "percent_sign_first",
        "tools:\n  - name: «%»s\n",
        "this is not YAML: ",
        "put a value that begins with this character in quotes",
    ),
    ("open_bracket", "tools: [\n«»", "this is not YAML: ", ""),
    ("unknown_tag", "tools: «!vault x»\n", "unknown tag !vault", "references are written {$env: NAME}"),
    (
        "python_tag",
        "tools: «!!python/object/apply:os.system [ls]»\n",
        "unknown tag !!python/object/apply:os.system",
        "references are written {$env: NAME}",
    ),
    ("alias_of_itself", "tools: «&»a\n  - *a\n", "an alias refers to what contains it", ""),
    (
        "impossible_date",
        "tools:\n  - {name: t, nodes: all, version: «2026-13-45»}\n",
        "cannot be read as a value",
        "put it in quotes",
    ),
    (
        "bad_share",
        "limits: {max_changed_nodes: «many»}\n",
        "max_changed_nodes: 'many' will not do",
        "write a share such as",
    ),
    (
        "unknown_default",
        "defaults: {«intervall»: 5m}\n",
        "unknown key 'intervall'",
        "did you mean 'interval'?",
    ),
    (
        "unknown_default_of_a_kind",
        "defaults: {wrapper: {«mod»: warn}}\n",
        "unknown key 'mod'",
        "did you mean 'mode'?",
    ),
    (
        "protected_that_is_no_list",
        "protected: «nodes.json»\n",
        "protected should be a list, this is text",
        "",
    ),
    (
        "protected_path",
        "wrappers:\n  - {name: w, nodes: node-1, dest: «~/.ssh/config», content: x}\n",
        "wrapper 'w' would write ~/.ssh/config, which is protected",
        "protected by the entry '~/.ssh/config'",
    ),
    (
        "protected_path_by_a_detour",
        "wrappers:\n  - {name: w, nodes: node-1, dest: «~/bin/../.ssh/./config», content: x}\n",
        "wrapper 'w' would write ~/.ssh/config, which is protected",
        "protected by",
    ),
    (
        "protected_file_name",
        "wrappers:\n  - {name: w, nodes: node-1, dest: «/srv/projects.json», content: x}\n",
        "wrapper 'w' would write /srv/projects.json",
        "protected by the entry 'projects.json'",
    ),
    (
        "protected_directory",
        "protected: [~/keys/]\nwrappers:\n  - {name: w, nodes: node-1, dest: «~/keys/a/b», content: x}\n",
        "wrapper 'w' would write ~/keys/a/b",
        "protected by the entry '~/keys/'",
    ),
    (
        "protected_pattern",
        "protected: ['/etc/*.conf']\nwrappers:\n  - {name: w, nodes: node-1, dest: «/etc/a.conf», content: x}\n",
        "wrapper 'w' would write /etc/a.conf",
        "protected by",
    ),
    (
        "protected_database",
        "protected: [~/d.db]\nschema:\n  - {name: d, nodes: all, database: «~/d.db», tables: {t: {columns: {a: TEXT}}}}\n",
        "schema 'd' would write ~/d.db, which is protected",
        "protected by",
    ),
    (
        "two_files_for_one_path",
        "wrappers:\n  - {name: v, nodes: all, dest: ~/w, content: y}\n  - {name: w, nodes: mac, dest: «~/x/../w», content: x}\n",
        "wrapper 'w' writes ~/w on mac, as wrapper 'v' does at desired_state/a.yml:2:5",
        "keep one, or let their nodes differ",
    ),
]


@pytest.mark.parametrize(
    ("text", "message", "hint"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
def test_mistake_is_named_at_its_place_with_a_way_out(
    fleet: Fleet, text: str, message: str, hint: str
) -> None:
    """File, line and column, a caret under what is meant, and a hint where there is one to give."""
    before, marked, _after = re.split("[«»]", text)
    place = f"a.yml:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
    fleet.write(re.sub("[«»]", "", text))
    said = reconcile("validate")
    assert (said.code, said.out) == (1, "")
    first = shown_problems(said.err)[0]
    assert first.place == place, said.err
    assert first.message.startswith(message)
    assert first.marked == marked.replace("\t", " ")
    assert first.hint.startswith(hint) if hint else first.hint == ""
    assert said.err.splitlines()[-1].endswith(" problem(s); nothing was touched.")


def test_resource_declared_twice_names_both_places(fleet: Fleet) -> None:
    """Two files, two places, and the node on which they meet."""
    fleet.write("tools:\n  - {name: t, nodes: workers}\n")
    fleet.write("tools:\n\n  - {name: t, nodes: node-2}\n", "b.yml")
    (found,) = shown_problems(reconcile("validate").err)
    assert found.place == "b.yml:3:5"
    assert found.message == "tool 't' is declared twice for node-2; first at desired_state/a.yml:2:5"
    assert found.hint == "keep one, or let their nodes differ"


def test_same_name_on_other_nodes_is_no_mistake(fleet: Fleet) -> None:
    """Identity is node, kind and name together."""
    fleet.write(
        "tools: [{name: t, nodes: node-1}, {name: t, nodes: node-2}]\nssh: [{name: t, nodes: node-1}]\n"
    )
    assert reconcile("validate").code == 0


def test_header_in_two_files_names_both_places(fleet: Fleet) -> None:
    """Settings of the fleet stand once."""
    fleet.write("defaults: {interval: 5m}\n")
    fleet.write("tools: []\ndefaults: {interval: 6m}\n", "b.yml")
    (found,) = shown_problems(reconcile("validate").err)
    assert found.place == "b.yml:2:1"
    assert found.marked == "defaults"
    assert found.message == "defaults stands in two files; the first is desired_state/a.yml:1:1"


def test_dependency_cycle_is_spelt_out(fleet: Fleet) -> None:
    """Who waits for whom, in a circle."""
    fleet.write(
        "tools:\n"
        "  - {name: a, nodes: node-1, depends_on: [tool/b]}\n"
        "  - {name: b, nodes: node-1, depends_on: [tool/c]}\n"
        "  - {name: c, nodes: node-1, depends_on: [tool/a]}\n"
    )
    (found,) = shown_problems(reconcile("validate").err)
    assert re.match(r"a.yml:[234]:42", found.place)
    assert re.match(r"dependency cycle: tool/(.) -> tool/. -> tool/. -> tool/\1 \(on node-1\)", found.message)
    assert found.hint == "remove one of these depends_on"


def test_dependency_on_itself_is_a_cycle(fleet: Fleet) -> None:
    """The shortest circle."""
    fleet.write("tools: [{name: a, nodes: node-1, depends_on: [tool/a]}]\n")
    assert "dependency cycle: tool/a -> tool/a (on node-1)" in reconcile("validate").err


def test_cycle_across_nodes_is_found(fleet: Fleet) -> None:
    """A dependency may name another node."""
    fleet.write(
        "tools:\n"
        "  - {name: a, nodes: node-1, depends_on: [node-2/tool/a]}\n"
        "  - {name: a, nodes: node-2, depends_on: [node-1/tool/a]}\n"
    )
    assert "dependency cycle" in reconcile("validate").err


def test_file_that_is_not_utf8_is_named_with_its_line(fleet: Fleet) -> None:
    """Latin-1 from an old editor."""
    fleet.write(b"tools:\n  - {name: caf\xe9, nodes: all}\n")
    (found,) = shown_problems(reconcile("validate").err)
    assert (found.place, found.message) == ("a.yml:2:1", "this is not UTF-8 text")
    assert found.hint == "save the file as UTF-8"


@pytest.mark.parametrize("text", ["", "\n", "# nothing yet\n", "---\n", "tools:\n", "tools: []\n"])
def test_file_without_entries_is_valid(fleet: Fleet, text: str) -> None:
    """An empty section is the first thing that anybody writes."""
    fleet.write(text)
    assert reconcile("validate").code == 0


def test_byte_order_mark_and_windows_line_ends_are_read(fleet: Fleet) -> None:
    """Places stay right."""
    fleet.write(b"\xef\xbb\xbftools:\r\n  - {name: t, nodes: all, verson: '1'}\r\n")
    (found,) = shown_problems(reconcile("validate").err)
    assert (found.place, found.marked) == ("a.yml:2:27", "verson")


def test_directory_that_is_missing_or_empty_says_what_to_do(fleet: Fleet) -> None:
    """The first run in a new repository."""
    said = reconcile("validate")
    assert said.code == 1
    assert shown_problems(said.err)[0].message == "no *.yml file in desired_state"
    said = reconcile("validate", "--desired", "elsewhere")
    assert shown_problems(said.err)[0].hint == "name it with --desired, or make one with: reconcile init"
    assert fleet.desired.is_dir()


def test_every_problem_is_reported_at_once_in_order(fleet: Fleet) -> None:
    """Nobody fixes mistakes one run at a time."""
    fleet.write("tools:\n  - {name: a, nodes: nobody}\n  - {nodes: all}\n")
    fleet.write("wrappers: {}\n", "b.yml")
    places = [found.place for found in shown_problems(reconcile("validate").err)]
    assert places == ["a.yml:2:22", "a.yml:3:5", "b.yml:1:11"]


def test_template_error_is_named_with_its_line(fleet: Fleet) -> None:
    """A variable that the node lacks, syntax, and a type error inside a template."""
    entry = "wrappers:\n  - {name: w, nodes: node-1, dest: ~/w, template: t.j2}\n"
    fleet.write(entry)
    for text, message in (
        ("a\n{{ missing }}\n", "t.j2: 'missing' is undefined"),
        ("a\n{% if %}\n", "t.j2: line 2: "),
        ("{{ 1 + 'a' }}\n", "t.j2: TypeError: "),
        ("{{ 1 / 0 }}\n", "t.j2: ZeroDivisionError: "),
        ("{{ ''.__class__.__mro__ }}\n", "t.j2: "),
    ):
        fleet.write(text, "t.j2")
        (found,) = shown_problems(reconcile("validate").err)
        assert (found.place, found.marked) == ("a.yml:2:51", "t.j2")
        assert found.message.startswith(message)


def test_template_that_is_not_text_is_a_problem_not_a_traceback(fleet: Fleet) -> None:
    """Binary content goes with src."""
    fleet.write("wrappers:\n  - {name: w, nodes: node-1, dest: ~/w, template: t.j2}\n")
    fleet.write(b"\xff\xfe", "t.j2")
    (found,) = shown_problems(reconcile("validate").err)
    assert (found.place, found.message) == ("a.yml:2:51", "t.j2 is not UTF-8 text")


def test_secret_file_that_is_a_directory_is_a_problem(fleet: Fleet) -> None:
    """Any reason why a file cannot be read is said in the system's words."""
    (fleet.desired / "d").mkdir()
    fleet.write("wrappers:\n  - {name: w, nodes: node-1, dest: ~/w, content: {$file: d}}\n")
    assert "cannot read 'd': Is a directory" in reconcile("validate").err


def test_problem_that_only_one_node_has_names_the_node(fleet: Fleet) -> None:
    """A variable of the wrong type on one of three."""
    fleet.variables("node-1", "wanted: '1.0'\n")
    fleet.variables("node-2", "wanted: 2\n")
    fleet.write("tools:\n  - {name: t, nodes: workers, version: {$var: wanted}}\n")
    (found,) = shown_problems(reconcile("validate").err)
    assert (found.place, found.marked) == ("a.yml:2:40", "{$var: wanted}")
    assert found.message == "version is text, this is a number (on node-2)"


def test_variable_that_cannot_be_templated_harms_only_who_uses_it(fleet: Fleet) -> None:
    """A broken variable elsewhere in the inventory is nobody's business."""
    fleet.variables("node-1", "broken: '{{ nothing_of_the_kind }}'\nfine: '{{ 1 + 1 }}'\n")
    fleet.write("tools:\n  - {name: t, nodes: node-1, command: x}\n")
    assert reconcile("validate").code == 0
    fleet.write("tools:\n  - {name: t, nodes: node-1, command: {$var: broken}}\n")
    assert "the variable 'broken' of node-1 cannot be templated" in reconcile("validate").err


def test_defaults_in_a_nodes_variables_are_checked(fleet: Fleet) -> None:
    """They are somebody's words too."""
    fleet.variables("node-1", "reconciler_defaults: {mode: sometimes}\n")
    fleet.write("tools:\n  - {name: t, nodes: node-1}\n")
    said = reconcile("validate")
    assert said.code == 1
    assert "reconciler_defaults of node-1" in said.err


def test_broken_inventory_is_a_problem_not_a_traceback(fleet: Fleet) -> None:
    """Nothing works without nodes."""
    fleet.write("tools: []\n")
    (fleet.inventory / "hosts.yml").write_text("all: {hosts: {}}\n")
    said = reconcile("validate")
    assert said.code == 1
    assert "has no hosts" in said.err
    assert "no inventory at nowhere" in reconcile("validate", "--inventory", "nowhere").err


def test_json_output_is_one_document_with_places(fleet: Fleet) -> None:
    """For editors and CI; the same problems go to standard error for people."""
    fleet.write("tools:\n  - {name: t, nodes: all, verson: '1'}\n")
    said = reconcile("validate", "--output", "json")
    assert said.code == 1
    assert said.json() == {
        "exit_code": 1,
        "problems": [
            {
                "message": "unknown key 'verson'",
                "hint": "did you mean 'version'?",
                "file": "desired_state/a.yml",
                "line": 2,
                "column": 27,
            }
        ],
    }
    fleet.write("tools:\n  - {name: t, nodes: all}\n")
    said = reconcile("validate", "--output", "json")
    assert said.code == 0
    assert said.json() == {
        "exit_code": 0,
        "problems": [],
        "resources": ["node-1/tool/t", "node-2/tool/t", "mac/tool/t"],
    }


def test_nothing_is_touched_while_the_desired_state_is_invalid(
    fleet: Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No node is asked, no store is made: exit code 1."""
    asked: list[object] = []
    monkeypatch.setattr("reconciler.runner.run", lambda *given: asked.append(given))
    fleet.write("tools:\n  - {name: t, nodes: all, verson: '1'}\n")
    fleet.write("wrappers:\n  - {name: w, nodes: all, dest: ~/w, content: fine}\n", "b.yml")
    database = fleet.directory / "state" / "r.db"
    for words in (("--once",), ("--check",), ("--once", "--output", "json")):
        said = reconcile(*words, "--db", str(database))
        assert said.code == 1
        assert "unknown key 'verson'" in said.err
    assert asked == []
    assert not database.parent.exists()
