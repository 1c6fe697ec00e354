package main

import (
	"context"
	"flag"
	"fmt"
	"io"
	"slices"
	"strings"
)

func completionCommand() command {
	return command{
		name: "completion", args: "bash|zsh|fish", offline: true,
		short:   "Print a shell's completion script",
		example: "source <(nanoctl completion bash)\nsource <(nanoctl completion zsh)\nnanoctl completion fish > ~/.config/fish/completions/nanoctl.fish",
		prepare: func(*flag.FlagSet) runner {
			return func(_ context.Context, e *env, args []string) error {
				switch args[0] {
				case "bash":
					writeBash(e.out)
				case "zsh":
					// zsh understands bash's scripts once it is told to.
					fmt.Fprintln(e.out, "autoload -Uz compinit bashcompinit && compinit && bashcompinit")
					writeBash(e.out)
				case "fish":
					writeFish(e.out)
				default:
					return usage("completion: %q is none of bash, zsh and fish", args[0])
				}
				return nil
			}
		},
	}
}

// The scripts hold commands and flags themselves; for arguments and the values
// of flags they run nanoctl, which asks the server.

// words returns the first words of the table, and the second words by first.
func words(table []command) (first []string, second map[string][]string) {
	second = make(map[string][]string)
	for _, c := range table {
		a, b, two := strings.Cut(c.name, " ")
		if !slices.Contains(first, a) {
			first = append(first, a)
		}
		if two {
			second[a] = append(second[a], b)
		}
	}
	return first, second
}

func flagNames(c *command) []string {
	var names []string
	flagsOf(c, new(env)).VisitAll(func(f *flag.Flag) { names = append(names, f.Name) })
	return names
}

func writeBash(w io.Writer) {
	table := commands()
	first, second := words(table)
	fmt.Fprintf(w, `_nanoctl() {
	local word="${COMP_WORDS[COMP_CWORD]}" command="${COMP_WORDS[1]}" list="" flags="" dash="-"
	if [ "$COMP_CWORD" -eq 1 ]; then
		list=%q
	else
		case "$command" in
`, strings.Join(append(first, "help"), " "))
	for _, f := range first {
		if len(second[f]) > 0 {
			fmt.Fprintf(w, "\t\t%s) if [ \"$COMP_CWORD\" -eq 2 ]; then list=%q; else command=\"$command ${COMP_WORDS[2]}\"; fi ;;\n",
				f, strings.Join(second[f], " "))
		}
	}
	fmt.Fprint(w, "\t\tesac\n\t\tcase \"$command\" in\n")
	for i := range table {
		fmt.Fprintf(w, "\t\t%q) flags=%q ;;\n", table[i].name, strings.Join(flagNames(&table[i]), " "))
	}
	fmt.Fprint(w, `		esac
	fi
	case "$word" in
	--*) dash="--" ;;
	esac
	if [ -z "$list" ]; then
		local IFS=$'\n'
		COMPREPLY=($(nanoctl __complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
		IFS=$' \t\n'
	else
		COMPREPLY=($(compgen -W "$list" -- "$word"))
	fi
	case "$word" in
	-*) COMPREPLY=($(compgen -P "$dash" -W "$flags" -- "${word#$dash}")) ;;
	esac
}
complete -o default -F _nanoctl nanoctl
`)
}

func writeFish(w io.Writer) {
	table := commands()
	first, second := words(table)
	fmt.Fprint(w, "complete -c nanoctl -n __fish_use_subcommand -f -a help -d 'Show help'\n")
	for _, f := range first {
		if len(second[f]) == 0 {
			c, _ := find(table, []string{f})
			fmt.Fprintf(w, "complete -c nanoctl -n __fish_use_subcommand -f -a %s -d %s\n", f, quoted(c.short))
			continue
		}
		fmt.Fprintf(w, "complete -c nanoctl -n __fish_use_subcommand -f -a %s\n", f)
		for _, s := range second[f] {
			c, _ := find(table, []string{f, s})
			fmt.Fprintf(w, "complete -c nanoctl -n '__fish_seen_subcommand_from %s; and not __fish_seen_subcommand_from %s' -f -a %s -d %s\n",
				f, strings.Join(second[f], " "), s, quoted(c.short))
		}
	}
	fmt.Fprintln(w, "complete -c nanoctl -n 'not __fish_use_subcommand' -f -a '(nanoctl __complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'")
	for i := range table {
		a, b, two := strings.Cut(table[i].name, " ")
		condition := "__fish_seen_subcommand_from " + a
		if two {
			condition += "; and __fish_seen_subcommand_from " + b
		}
		flagsOf(&table[i], new(env)).VisitAll(func(f *flag.Flag) {
			_, what := flag.UnquoteUsage(f)
			fmt.Fprintf(w, "complete -c nanoctl -n '%s' -o %s -d %s\n", condition, f.Name, quoted(what))
		})
	}
}

// quoted is a text in fish's quotes.
func quoted(s string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, "'", `\'`).Replace(s) + "'"
}
