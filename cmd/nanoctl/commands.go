package main

// group is a part of the table under a heading of the help.
type group struct {
	title    string
	commands []command
}

// groups are the commands in the order of the help.
func groups() []group {
	return []group{
		{"Devices", []command{
			enrollmentsLsCommand(), showCommand(), applicationsCommand(), queueCommand(), clearCommand(), pushCommand(), tagCommand(), untagCommand(), tagsLsCommand(), disableCommand(), enableCommand(), deleteCommand(),
		}},
		{"Commands for devices", []command{
			sendCommand(), installProfileCommand(), removeProfileCommand(), commandCommand(), commandsLsCommand(), statusCommand(),
			resultCommand(), cancelCommand(), requeueCommand(),
		}},
		{"Certificates and secrets", []command{
			pushCertPutCommand(), pushCertLsCommand(), pushCertRmCommand(), renewalOpenCommand(), renewalCloseCommand(), bootstrapTokenCommand(),
			unlockTokenCommand(), escrowUnlockCommand(), resealCommand(),
		}},
		{"Events", []command{
			eventsCommand(), sinksLsCommand(), sinksPutCommand(), sinksRmCommand(), redeliverCommand(),
		}},
		{"Server", []command{
			statsCommand(), replicasCommand(), topCommand(), backupCommand(), restoreCommand(), keysLsCommand(), keysCreateCommand(), keysRmCommand(), auditCommand(),
		}},
		{"nanoctl", []command{
			contextLsCommand(), contextAddCommand(), contextUseCommand(), contextRmCommand(), versionCommand(), completionCommand(),
		}},
	}
}

// commands is the table of all commands.
func commands() []command {
	var all []command
	for _, g := range groups() {
		all = append(all, g.commands...)
	}
	return all
}
