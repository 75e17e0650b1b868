//! The files and directories of a [`super::FaultDisk`], each with what is synced of it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Component, Path};

#[derive(Debug, Clone)]
pub(super) enum Node {
    File { bytes: Vec<u8>, synced: Vec<u8> },
    Directory { entries: Entries, synced: Entries, pending: Vec<Change> },
}

pub(super) type Entries = BTreeMap<String, usize>;
/// Entries set or removed together.
pub(super) type Change = Vec<(String, Option<usize>)>;

/// All nodes ever made, by position. `/` is the first. Removed nodes stay in the list, out of
/// reach.
#[derive(Debug, Clone)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
}

impl Tree {
    pub(super) fn find(&self, path: &Path) -> io::Result<usize> {
        let mut position = 0;
        for component in path.components() {
            let Component::Normal(name) = component else {
                continue;
            };
            let name = name.to_str().ok_or(io::ErrorKind::InvalidInput)?;
            position = match &self.nodes[position] {
                Node::Directory { entries, .. } => *entries.get(name).ok_or(io::ErrorKind::NotFound)?,
                Node::File { .. } => return Err(io::ErrorKind::NotADirectory.into()),
            };
        }
        Ok(position)
    }

    pub(super) fn node(&mut self, path: &Path) -> io::Result<&mut Node> {
        let position = self.find(path)?;
        Ok(&mut self.nodes[position])
    }

    pub(super) fn change_entries(&mut self, directory: &Path, change: Change) -> io::Result<()> {
        match self.node(directory)? {
            Node::Directory { entries, pending, .. } => {
                apply(entries, &change);
                pending.push(change);
                Ok(())
            }
            Node::File { .. } => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    pub(super) fn add(&mut self, path: &Path, node: Node) -> io::Result<()> {
        if self.find(path).is_ok() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let (parent, name) = split(path)?;
        let position = self.nodes.len();
        self.change_entries(parent, vec![(name, Some(position))])?;
        self.nodes.push(node);
        Ok(())
    }

    pub(super) fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let position = self.find(from)?;
        if let Ok(target) = self.node(to)
            && let Node::Directory { entries, .. } = target
            && !entries.is_empty()
        {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        let (from_parent, from_name) = split(from)?;
        let (to_parent, to_name) = split(to)?;
        if from_parent == to_parent {
            let change = vec![(from_name, None), (to_name, Some(position))];
            return self.change_entries(from_parent, change);
        }
        self.change_entries(to_parent, vec![(to_name, Some(position))])?;
        self.change_entries(from_parent, vec![(from_name, None)])
    }

    /// One change. Both must lie in one directory, as they do for the only caller.
    pub(super) fn exchange(&mut self, one: &Path, other: &Path) -> io::Result<()> {
        let (first, second) = (self.find(one)?, self.find(other)?);
        let (one_parent, one_name) = split(one)?;
        let (other_parent, other_name) = split(other)?;
        if one_parent != other_parent {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.change_entries(one_parent, vec![(one_name, Some(second)), (other_name, Some(first))])
    }

    pub(super) fn unlink(&mut self, path: &Path) -> io::Result<()> {
        self.find(path)?;
        let (parent, name) = split(path)?;
        self.change_entries(parent, vec![(name, None)])
    }

    pub(super) fn remove_tree(&mut self, path: &Path) -> io::Result<()> {
        if let Node::Directory { entries, .. } = self.node(path)? {
            let names: Vec<String> = entries.keys().cloned().collect();
            for name in names {
                self.remove_tree(&path.join(name))?;
            }
        }
        self.unlink(path)
    }
}

pub(super) fn empty_directory() -> Node {
    Node::Directory { entries: Entries::new(), synced: Entries::new(), pending: Vec::new() }
}

pub(super) fn sync(node: &mut Node) {
    match node {
        Node::File { bytes, synced } => synced.clone_from(bytes),
        Node::Directory { entries, synced, pending } => {
            synced.clone_from(entries);
            pending.clear();
        }
    }
}

pub(super) fn apply(entries: &mut Entries, change: &Change) {
    for (name, position) in change {
        match position {
            Some(position) => entries.insert(name.clone(), *position),
            None => entries.remove(name),
        };
    }
}

fn split(path: &Path) -> io::Result<(&Path, String)> {
    let name = path.file_name().and_then(|name| name.to_str()).ok_or(io::ErrorKind::InvalidInput)?;
    Ok((path.parent().unwrap_or(Path::new("/")), name.to_string()))
}
