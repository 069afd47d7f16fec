# Short names for the scripts in bin/.
.PHONY: style test slow demo

style: # lint, format, types, spelling, shell scripts
	bash bin/style.sh

test: # style, then the tests
	bash bin/test.sh

slow: # the tests that take minutes
	bash bin/test.sh -m slow

demo: # the whole method on toy data, results in _output/demo
	bash bin/demo.sh
