//! The objects of the verbs library, behind types that free them.
//!
//! This file owns what the library creates ([`Context`], [`Domain`], [`Memory`], [`QueuePair`]) and
//! frees each exactly once, in the right order. It knows nothing of limits or ranks; `device.rs` does.
//!
//! `ibv_post_send`, `ibv_post_recv` and `ibv_poll_cq` are no symbols but inline functions that call
//! through a table in the context. This file calls them through the same table.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ffi::{CStr, c_int};
use std::ptr::{self, NonNull};
use std::sync::{Arc, Mutex, PoisonError};

use crate::functions::Library;
use crate::layout::{self, DeviceAttr, Gid, PortAttr, QpAttr, QpInitAttr, WorkCompletion, platform};

/// Every device of interest has one port, and ports count from 1.
const PORT: u8 = 1;

/// Alignment of registered memory: a page of macOS, four of Linux.
const PAGE_BYTES: usize = 16 << 10;

/// A call that failed and the error number it left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    pub(crate) call: &'static str,
    pub(crate) errno: i32,
}

impl Failed {
    fn last(call: &'static str) -> Failed {
        Failed { call, errno: std::io::Error::last_os_error().raw_os_error().unwrap_or(0) }
    }

    /// For functions that return the error's number; Apple's return it negative.
    fn check(call: &'static str, returned: c_int) -> Result<(), Failed> {
        match returned {
            0 => Ok(()),
            -1 => Err(Failed::last(call)),
            errno => Err(Failed { call, errno: errno.abs() }),
        }
    }
}

impl Library {
    /// Calls `visit` for every device until it returns something.
    fn visit<T>(&self, mut visit: impl FnMut(*mut layout::Device, &str) -> Option<T>) -> Result<Option<T>, Failed> {
        let mut count = 0;
        // SAFETY: `count` outlives the call.
        let list = unsafe { (self.ibv_get_device_list)(&mut count) };
        if list.is_null() {
            return Err(Failed::last("ibv_get_device_list"));
        }
        let result = (0..usize::try_from(count).unwrap_or(0)).find_map(|index| {
            // SAFETY: the list has `count` devices, valid until it is freed, and a name is a C
            // string of the device.
            let (device, name) = unsafe {
                let device = *list.add(index);
                (device, CStr::from_ptr((self.ibv_get_device_name)(device)).to_string_lossy())
            };
            visit(device, &name)
        });
        // SAFETY: the list came from `get_device_list` and is freed once; devices opened from it
        // stay valid.
        unsafe { (self.ibv_free_device_list)(list) };
        Ok(result)
    }

    pub(crate) fn device_names(&self) -> Result<Vec<String>, Failed> {
        let mut names = Vec::new();
        self.visit(|_, name| {
            names.push(name.to_string());
            None::<()>
        })?;
        Ok(names)
    }

    /// The device of that name; none if there is none.
    pub(crate) fn open_device(&'static self, wanted: &str) -> Result<Option<Context>, Failed> {
        let opened = self.visit(|device, name| {
            (name == wanted).then(|| {
                // SAFETY: `device` is in the list that `visit` holds.
                let context = NonNull::new(unsafe { (self.ibv_open_device)(device) });
                context.map(|raw| Context { library: self, raw }).ok_or_else(|| Failed::last("ibv_open_device"))
            })
        })?;
        opened.transpose()
    }
}

/// An open device.
pub(crate) struct Context {
    library: &'static Library,
    raw: NonNull<layout::Context>,
}

// SAFETY: the verbs interface is thread-safe (rdma-core: "fully thread safe"); nothing here hands
// out the pointer.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    pub(crate) fn port(&self) -> Result<PortAttr, Failed> {
        let mut attributes = PortAttr::default();
        // SAFETY: the context is open, and `PortAttr` is at least as long as what any library
        // writes.
        let returned = unsafe { (self.library.ibv_query_port)(self.raw.as_ptr(), PORT, &mut attributes) };
        Failed::check("ibv_query_port", returned).map(|()| attributes)
    }

    /// An entry of the port's table of addresses; none if it is empty.
    pub(crate) fn gid(&self, index: c_int) -> Option<[u8; 16]> {
        let mut gid = Gid::default();
        // SAFETY: the context is open and `gid` outlives the call.
        let returned = unsafe { (self.library.ibv_query_gid)(self.raw.as_ptr(), PORT, index, &mut gid) };
        (returned == 0).then_some(gid.raw)
    }

    /// What the device can do, if the library can tell.
    pub(crate) fn attributes(&self) -> Option<DeviceAttr> {
        let mut attributes = DeviceAttr::default();
        // SAFETY: the context is open, and `DeviceAttr` is longer than the C structure.
        let returned = unsafe { self.library.ibv_query_device?(self.raw.as_ptr(), &mut attributes) };
        (returned == 0).then_some(attributes)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: open until now; everything made from it holds it, so is gone.
        unsafe { (self.library.ibv_close_device)(self.raw.as_ptr()) };
    }
}

/// A protection domain of an open device. All that a process has of a device may share it.
pub(crate) struct Domain {
    raw: NonNull<layout::Pd>,
    context: Context,
}

// SAFETY: verbs objects may be used from any thread; nothing here hands out the pointer.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    pub(crate) fn allocate(context: Context) -> Result<Arc<Domain>, Failed> {
        // SAFETY: the context is open.
        let raw = NonNull::new(unsafe { (context.library.ibv_alloc_pd)(context.raw.as_ptr()) });
        let raw = raw.ok_or_else(|| Failed::last("ibv_alloc_pd"))?;
        Ok(Arc::new(Domain { raw, context }))
    }

    /// The device that it belongs to.
    pub(crate) fn context(&self) -> &Context {
        &self.context
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // SAFETY: memory and queue pairs hold the domain, so they are gone; the context closes after this.
        unsafe { (self.context.library.ibv_dealloc_pd)(self.raw.as_ptr()) };
    }
}

/// One piece of registered memory, given out in parts.
pub(crate) struct Memory {
    start: NonNull<u8>,
    layout: Layout,
    region: NonNull<layout::Mr>,
    given_out: Mutex<usize>,
    domain: Arc<Domain>,
}

// SAFETY: verbs objects may be used from any thread; the bytes are only reached through parts, each
// with one owner.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Registers `bytes` of fresh, page-aligned, zeroed memory: the device may write where receives
    /// are posted, and no peer may address it.
    pub(crate) fn register(domain: Arc<Domain>, bytes: usize) -> Result<Arc<Memory>, Failed> {
        let layout = Layout::from_size_align(bytes.max(1), PAGE_BYTES).expect("less than half the address space");
        // SAFETY: of more than no bytes.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).unwrap_or_else(|| handle_alloc_error(layout));
        // SAFETY: the domain is open; the memory is ours and stays until the region is gone.
        let region = unsafe {
            let access = layout::ACCESS_LOCAL_WRITE;
            (domain.context.library.ibv_reg_mr)(domain.raw.as_ptr(), start.as_ptr().cast(), layout.size(), access)
        };
        let Some(region) = NonNull::new(region) else {
            let failed = Failed::last("ibv_reg_mr");
            // SAFETY: allocated above with this layout, used by nobody.
            unsafe { dealloc(start.as_ptr(), layout) };
            return Err(failed);
        };
        Ok(Arc::new(Memory { start, layout, region, given_out: Mutex::new(0), domain }))
    }

    /// The next `bytes` without an owner.
    pub(crate) fn part(self: &Arc<Self>, bytes: usize) -> Part {
        let mut given_out = self.given_out.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = *given_out;
        assert!(bytes <= self.layout.size() - offset, "more memory given out than registered");
        *given_out += bytes;
        Part { memory: Arc::clone(self), offset, bytes }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold the memory, so they are gone; the region is given back once, before
        // the domain. If the driver keeps the region, the memory stays too: it leaks, but nobody else
        // gets it.
        unsafe {
            if (self.domain.context.library.ibv_dereg_mr)(self.region.as_ptr()) == 0 {
                dealloc(self.start.as_ptr(), self.layout);
            }
        }
    }
}

/// Some bytes of registered memory that one queue pair owns.
pub(crate) struct Part {
    memory: Arc<Memory>,
    offset: usize,
    bytes: usize,
}

impl Part {
    fn pointer(&self, at: usize, bytes: usize) -> *mut u8 {
        assert!(at <= self.bytes && bytes <= self.bytes - at, "{bytes} bytes at {at} of a part of {}", self.bytes);
        // SAFETY: within the memory, by the check above and by how parts are made.
        unsafe { self.memory.start.as_ptr().add(self.offset + at) }
    }

    fn write(&mut self, at: usize, bytes: &[u8]) {
        // SAFETY: in bounds, and only this part's owner writes here. No reference to registered
        // memory ever exists, so the device may write to it at any time.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.pointer(at, bytes.len()), bytes.len()) };
    }

    fn read(&self, at: usize, into: &mut [u8]) {
        // SAFETY: in bounds and initialised (zeroed at first); see `write` about the device.
        unsafe { ptr::copy_nonoverlapping(self.pointer(at, into.len()), into.as_mut_ptr(), into.len()) };
    }

    fn scatter_gather(&self, at: usize, bytes: usize) -> layout::ScatterGather {
        // SAFETY: the region is registered as long as `memory` lives.
        let lkey = unsafe { self.memory.region.as_ref().lkey };
        layout::ScatterGather { addr: self.pointer(at, bytes) as u64, length: bytes as u32, lkey }
    }
}

/// The parameters of a new queue pair.
#[derive(Clone, Copy, Debug)]
pub(crate) struct QueuePairShape {
    pub(crate) reliable: bool,
    /// Sends and receives that can be posted, in the unit of the device (4 KiB frames on a Mac,
    /// messages elsewhere).
    pub(crate) sends: u32,
    pub(crate) receives: u32,
}

/// Where a queue pair's messages go.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Path {
    pub(crate) number: u32,
    pub(crate) first_packet: u32,
    pub(crate) lid: u16,
    pub(crate) gid: [u8; 16],
    pub(crate) own_gid_index: u8,
    /// As in `enum ibv_mtu`.
    pub(crate) mtu: u32,
}

/// A queue pair with its own completion queue and its own part of the memory.
pub(crate) struct QueuePair {
    raw: NonNull<layout::Qp>,
    completions: NonNull<layout::CompletionQueue>,
    reliable: bool,
    part: Part,
}

// SAFETY: verbs objects may be used from any thread; posting and polling need `&mut self`.
unsafe impl Send for QueuePair {}

impl QueuePair {
    pub(crate) fn create(part: Part, shape: QueuePairShape) -> Result<QueuePair, Failed> {
        let domain = &part.memory.domain;
        let (library, context) = (domain.context.library, domain.context.raw.as_ptr());
        let entries = (shape.sends + shape.receives + 1) as c_int;
        // SAFETY: the context is open; no channel, no context of ours.
        let completions = unsafe { (library.ibv_create_cq)(context, entries, ptr::null_mut(), ptr::null_mut(), 0) };
        let completions = NonNull::new(completions).ok_or_else(|| Failed::last("ibv_create_cq"))?;
        let mut attributes = QpInitAttr {
            qp_context: ptr::null_mut(),
            send_cq: completions.as_ptr(),
            recv_cq: completions.as_ptr(),
            srq: ptr::null_mut(),
            cap: layout::QpCap {
                max_send_wr: shape.sends,
                max_recv_wr: shape.receives,
                max_send_sge: 1,
                max_recv_sge: 1,
                max_inline_data: 0,
            },
            qp_type: if shape.reliable { layout::QPT_RC } else { layout::QPT_UC },
            sq_sig_all: 1,
        };
        // SAFETY: domain and completion queue are open, `attributes` outlives the call.
        let raw = unsafe { (library.ibv_create_qp)(domain.raw.as_ptr(), &mut attributes) };
        let Some(raw) = NonNull::new(raw) else {
            let failed = Failed::last("ibv_create_qp");
            // SAFETY: made above, used by nobody.
            unsafe { (library.ibv_destroy_cq)(completions.as_ptr()) };
            return Err(failed);
        };
        Ok(QueuePair { raw, completions, reliable: shape.reliable, part })
    }

    fn library(&self) -> &'static Library {
        self.part.memory.domain.context.library
    }

    fn operations(&self) -> &layout::ContextOps {
        // SAFETY: the context stays open as long as the memory that this queue pair holds.
        unsafe { &self.part.memory.domain.context.raw.as_ref().ops }
    }

    /// The number that the peer addresses.
    pub(crate) fn number(&self) -> u32 {
        // SAFETY: a queue pair that exists.
        unsafe { self.raw.as_ref().qp_num }
    }

    /// Sends and receives that can really be posted, if the library can tell.
    pub(crate) fn depth(&self) -> Option<(u32, u32)> {
        let mut attributes = QpAttr::default();
        // SAFETY: all zeros (null pointers, no queues) is a value of this C structure.
        let mut initial: QpInitAttr = unsafe { std::mem::zeroed() };
        // SAFETY: the queue pair exists, and both structures outlive the call.
        let returned =
            unsafe { self.library().ibv_query_qp?(self.raw.as_ptr(), &mut attributes, layout::QP_CAP, &mut initial) };
        (returned == 0).then_some((attributes.cap.max_send_wr, attributes.cap.max_recv_wr))
    }

    fn modify(&mut self, call: &'static str, mut attributes: QpAttr, mask: c_int) -> Result<(), Failed> {
        // SAFETY: the queue pair exists, and `attributes` outlives the call.
        Failed::check(call, unsafe { (self.library().ibv_modify_qp)(self.raw.as_ptr(), &mut attributes, mask) })
    }

    /// RESET to INIT: receives can be posted from here on.
    pub(crate) fn initialise(&mut self) -> Result<(), Failed> {
        let attributes = QpAttr {
            qp_state: layout::QPS_INIT,
            port_num: PORT,
            qp_access_flags: layout::ACCESS_LOCAL_WRITE as u32,
            ..QpAttr::default()
        };
        let mask = layout::QP_STATE | layout::QP_PKEY_INDEX | layout::QP_PORT | layout::QP_ACCESS_FLAGS;
        self.modify("ibv_modify_qp to INIT", attributes, mask)
    }

    /// INIT to RTR: messages of the peer are received.
    pub(crate) fn ready_to_receive(&mut self, path: &Path) -> Result<(), Failed> {
        let mut attributes = QpAttr {
            qp_state: layout::QPS_RTR,
            path_mtu: path.mtu,
            rq_psn: path.first_packet,
            dest_qp_num: path.number,
            ..QpAttr::default()
        };
        let address = &mut attributes.ah_attr;
        (address.dlid, address.is_global, address.port_num) = (path.lid, 1, PORT);
        address.grh.dgid = Gid { raw: path.gid };
        (address.grh.sgid_index, address.grh.hop_limit) = (path.own_gid_index, platform::HOP_LIMIT);
        let mut mask = layout::QP_STATE | layout::QP_AV | layout::QP_PATH_MTU | layout::QP_DEST_QPN | layout::QP_RQ_PSN;
        if self.reliable {
            // 12: 0.64 ms until a sender tries again that found no receive. Credits see to it that
            // none does.
            (attributes.max_dest_rd_atomic, attributes.min_rnr_timer) = (1, 12);
            mask |= layout::QP_MAX_DEST_RD_ATOMIC | layout::QP_MIN_RNR_TIMER;
        }
        self.modify("ibv_modify_qp to RTR", attributes, mask)
    }

    /// RTR to RTS: messages can be sent.
    pub(crate) fn ready_to_send(&mut self, first_packet: u32) -> Result<(), Failed> {
        let mut attributes = QpAttr { qp_state: layout::QPS_RTS, sq_psn: first_packet, ..QpAttr::default() };
        let mut mask = layout::QP_STATE | layout::QP_SQ_PSN;
        if self.reliable {
            // 4.096 us * 2^15 = 134 ms, seven times: a dead peer is an error after about a second.
            // 7 retries would be "for ever" with some drivers (soft-RoCE), and 7 is "for ever" by
            // definition for a receiver that is not ready.
            (attributes.timeout, attributes.retry_cnt, attributes.rnr_retry) = (15, 6, 6);
            attributes.max_rd_atomic = 1;
            mask |= layout::QP_TIMEOUT | layout::QP_RETRY_CNT | layout::QP_RNR_RETRY | layout::QP_MAX_QP_RD_ATOMIC;
        }
        self.modify("ibv_modify_qp to RTS", attributes, mask)
    }

    /// Any state to ERR: everything posted completes as flushed.
    pub(crate) fn fail(&mut self) -> Result<(), Failed> {
        let attributes = QpAttr { qp_state: layout::QPS_ERR, ..QpAttr::default() };
        self.modify("ibv_modify_qp to ERR", attributes, layout::QP_STATE)
    }

    /// Copies into the registered memory.
    pub(crate) fn write(&mut self, at: usize, bytes: &[u8]) {
        self.part.write(at, bytes);
    }

    /// Copies out of the registered memory.
    pub(crate) fn read(&self, at: usize, into: &mut [u8]) {
        self.part.read(at, into);
    }

    /// Posts a receive of one message into `bytes` at `at`.
    pub(crate) fn post_receive(&mut self, id: u64, at: usize, bytes: usize) -> Result<(), Failed> {
        let mut place = self.part.scatter_gather(at, bytes);
        let mut request = layout::ReceiveRequest { wr_id: id, next: ptr::null_mut(), sg_list: &mut place, num_sge: 1 };
        let mut refused = ptr::null_mut();
        let post = self.operations().post_recv.expect("every provider has post_recv");
        // SAFETY: the queue pair exists; request and list are read during the call only; the bytes
        // lie in registered memory that outlives the queue pair.
        Failed::check("ibv_post_recv", unsafe { post(self.raw.as_ptr(), &mut request, &mut refused) })
    }

    /// Posts the `bytes` at `at` as one message; they must not change before its completion.
    pub(crate) fn post_send(&mut self, id: u64, at: usize, bytes: usize) -> Result<(), Failed> {
        let mut place = self.part.scatter_gather(at, bytes);
        let mut request = layout::SendRequest {
            wr_id: id,
            next: ptr::null_mut(),
            sg_list: &mut place,
            num_sge: 1,
            opcode: platform::WR_SEND,
            send_flags: platform::SEND_SIGNALED,
            imm_data: 0,
            unused: [0; 11],
        };
        let mut refused = ptr::null_mut();
        let post = self.operations().post_send.expect("every provider has post_send");
        // SAFETY: as in `post_receive`.
        Failed::check("ibv_post_send", unsafe { post(self.raw.as_ptr(), &mut request, &mut refused) })
    }

    /// Takes completions; returns how many.
    pub(crate) fn poll(&mut self, into: &mut [WorkCompletion]) -> Result<usize, Failed> {
        let poll = self.operations().poll_cq.expect("every provider has poll_cq");
        // SAFETY: the completion queue exists, and at most `into.len()` entries are written.
        let count = unsafe { poll(self.completions.as_ptr(), into.len() as c_int, into.as_mut_ptr()) };
        usize::try_from(count).map_err(|_| Failed { call: "ibv_poll_cq", errno: count.abs() })
    }
}

impl Drop for QueuePair {
    fn drop(&mut self) {
        let library = self.library();
        // SAFETY: made by `create` and given back once, the queue pair before the completion queue
        // that it uses.
        unsafe {
            (library.ibv_destroy_qp)(self.raw.as_ptr());
            (library.ibv_destroy_cq)(self.completions.as_ptr());
        }
    }
}
