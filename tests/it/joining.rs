//! Ranks that other launchers start: how they meet, wait, and fail to meet. The launchers'
//! variables are set by hand.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use crate::folder::{CRASH_RECIPE, Folder};
use crate::program::{Running, free_port, run, start};

/// One rank of a group on this machine, in a folder of its own choice.
fn rank(folder: &Folder, port: u16, rank: usize, world: usize, output: &str, arguments: &[&str]) -> Command {
    let mut command = folder.command(output, arguments);
    command.env("RANK", rank.to_string()).env("WORLD_SIZE", world.to_string());
    command.env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", port.to_string()).env_remove("FINETUNE_TOKEN_FILE");
    command
}

fn says(running: &mut Running, text: &str) {
    running.wait_until(text, |running| running.stderr().contains(text));
}

/// Without a token, ranks use the user's secret, which each rank finds by itself.
#[test]
fn ranks_of_one_machine_meet_whatever_they_know_of_their_user() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let port = free_port();
    let mut first = rank(&folder, port, 0, 2, "run", &[]);
    let mut second = rank(&folder, port, 1, 2, "run", &[]);
    second.env_remove("HOME").env_remove("XDG_RUNTIME_DIR").env_remove("TMPDIR");
    let (first, second) = (start(&mut first), start(&mut second));
    first.wait().expect(0).says("2 ranks joined over tcp");
    second.wait().expect(0);
}

/// A rank that waits says for whom, as which rank, and by which variables. It waits as long as the
/// recipe says.
#[test]
fn a_wait_says_so_and_ends_in_time() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let words = ["--set", "distributed.join_timeout=\"3s\""];
    let alone = start(&mut rank(&folder, free_port(), 0, 3, "run", &words));
    let lost = start(&mut rank(&folder, free_port(), 2, 3, "run", &words));
    alone
        .wait()
        .expect(3)
        .says("rank 0 of 3 (by RANK and WORLD_SIZE): 1 of 3 ranks are here")
        .says("waiting for ranks 1 and 2 to call 127.0.0.1:")
        .says("ranks 1 and 2 did not join within 3 s");
    lost.wait().expect(3).says("waiting for rank 0 at 127.0.0.1:").says("refused").says("rank 2 did not reach rank 0");
}

/// Two jobs have the same port. The second is refused, and the first goes on waiting for its own
/// ranks.
#[test]
fn a_second_job_on_the_same_port_disturbs_nobody() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let port = free_port();
    let mut first = start(&mut rank(&folder, port, 0, 2, "first", &[]));
    says(&mut first, "waiting for rank 1");
    let other = ["--set", "optimizer.learning_rate=5e-4"];
    let stray = start(&mut rank(&folder, port, 1, 2, "second", &other));
    stray.wait().expect(2).says("its recipe (optimizer.learning_rate) is not rank 0's");
    run(&mut rank(&folder, port, 0, 2, "second", &other)).expect(2).says("another process is rank 0 there already");
    says(&mut first, "was turned away");
    let own = start(&mut rank(&folder, port, 1, 2, "first", &[]));
    first.wait().expect(0);
    own.wait().expect(0);
}

/// Variables that contradict each other end the run before anything is read.
#[test]
fn contradictions_are_mistakes() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let mpi = |rank: usize| {
        let mut command = folder.command("run", &[]);
        command.env("OMPI_COMM_WORLD_RANK", rank.to_string()).env("OMPI_COMM_WORLD_SIZE", "2");
        command.env("OMPI_COMM_WORLD_LOCAL_RANK", rank.to_string()).env("OMPI_COMM_WORLD_LOCAL_SIZE", "2");
        command
    };
    run(mpi(0).env("RANK", "0").env("WORLD_SIZE", "1")).expect(2).says("WORLD_SIZE=1").says("OMPI_COMM_WORLD_SIZE=2");
    run(mpi(1).env("RANK", "0").env("WORLD_SIZE", "2").env("MASTER_ADDR", "127.0.0.1").env("MASTER_PORT", "1"))
        .expect(2)
        .says("RANK=0")
        .says("OMPI_COMM_WORLD_RANK=1");
    assert!(!folder.path("run").exists());
}

/// The others do not wait for a rank that fails before it joins, whichever rank it is.
#[test]
fn a_rank_that_cannot_start_ends_the_others() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.write("wrong.toml", CRASH_RECIPE.replace("rank = 4", "rnk = 4").as_bytes());
    for failing in [0, 1] {
        let port = free_port();
        let mut waiting = start(&mut rank(&folder, port, 1 - failing, 2, "run", &[]));
        says(&mut waiting, "waiting for rank");
        let mut command = crate::program::finetune(["run", "wrong.toml", "--output-dir", "run"]);
        command.env("RANK", failing.to_string()).env("WORLD_SIZE", "2").env("MASTER_ADDR", "127.0.0.1");
        command.env("MASTER_PORT", port.to_string()).env_remove("FINETUNE_TOKEN_FILE").current_dir(folder.path(""));
        run(&mut command).expect(2).says("rnk");
        waiting.wait().expect(2).says("failed before it joined: ").says("rnk");
    }
}

/// A rank with another token than rank 0's is no rank of its run. It says so in seconds, and that another try is of no
/// use; rank 0 waits on for its own.
#[test]
fn another_token_is_a_mistake() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    let port = free_port();
    let with_token = |number: usize, token: &str, output: &str| {
        let file = folder.path(token);
        folder.write(token, token.repeat(16).as_bytes());
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).expect("our own file");
        let mut command = rank(&folder, port, number, 2, output, &[]);
        command.env("FINETUNE_TOKEN_FILE", &file);
        start(&mut command)
    };
    let mut first = with_token(0, "a", "run");
    says(&mut first, "waiting for rank 1");
    with_token(1, "b", "other").wait().expect(2).says("does not hold the token").says("all ranks need the same token");
    let own = with_token(1, "a", "run");
    first.wait().expect(0);
    own.wait().expect(0);
}

/// Where every rank is told `localhost` though they are on several machines, those above 0 look for rank 0 at home.
#[test]
fn an_address_that_leads_home_is_named() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.write("token", b"0123456789abcdef0123456789abcdef\n");
    let mut lost = rank(&folder, free_port(), 1, 2, "run", &["--set", "distributed.join_timeout=\"3s\""]);
    lost.env("MASTER_ADDR", "localhost").env("FINETUNE_TOKEN_FILE", folder.path("token"));
    run(&mut lost).expect(3).says("an address of this machine").says("is rank 0 running on this machine?");
}

#[test]
fn a_token_file_that_others_can_read_is_named() {
    let folder = Folder::with_recipe(CRASH_RECIPE);
    folder.write("token", b"0123456789abcdef0123456789abcdef\n");
    let file = folder.path("token");
    for (mode, warned) in [(0o600, false), (0o644, true)] {
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).expect("our own file");
        let output = format!("run-{mode:o}");
        let mut command = folder.command(&output, &[]);
        command.env("RANK", "0").env("WORLD_SIZE", "1").env("FINETUNE_TOKEN_FILE", &file);
        let ended = run(&mut command).expect(0);
        assert_eq!(ended.stderr.contains("chmod 600"), warned, "{mode:o}: {}", ended.stderr);
    }
}
