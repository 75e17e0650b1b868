//! The C structures and numbers of the verbs interface, as in rdma-core's `infiniband/verbs.h` for
//! 64-bit machines.
//!
//! Names are those of the header in Rust's spelling; where the header's line is a union, its
//! largest member decides the size. `layout_test.rs` has a C compiler print every size, offset and
//! number used here, and compares.
//!
//! **On macOS** the header is in the SDK (26.2 and later). What is known without a Mac: the same
//! symbols exist; `post_send`, `post_recv` and `poll_cq` go through the same table in the context
//! (MLX's JACCL compiles against that header and does this); a port that works reads ACTIVE = 4
//! (TN3205). That the numbers below are the same there is likely, since Apple took the interface
//! over, but not confirmed: one project that writes them out by hand has `SEND` = 0 and `SIGNALED`
//! = 1, in code that shows no sign of having run. On a Mac with the SDK the layout test decides;
//! the two numbers in doubt are in [`platform`]. Every queue pair also asks for a completion of
//! every send (`sq_sig_all`), so `SIGNALED` matters little.

use std::ffi::{c_char, c_int, c_void};

/// `IBV_QPT_*`.
pub(super) const QPT_RC: u32 = 2;
pub(super) const QPT_UC: u32 = 3;

/// `IBV_QPS_*`.
pub(super) const QPS_INIT: u32 = 1;
pub(super) const QPS_RTR: u32 = 2;
pub(super) const QPS_RTS: u32 = 3;
pub(super) const QPS_ERR: u32 = 6;

/// `IBV_QP_*`: which fields of [`QpAttr`] count.
pub(super) const QP_STATE: c_int = 1;
pub(super) const QP_ACCESS_FLAGS: c_int = 1 << 3;
pub(super) const QP_PKEY_INDEX: c_int = 1 << 4;
pub(super) const QP_PORT: c_int = 1 << 5;
pub(super) const QP_AV: c_int = 1 << 7;
pub(super) const QP_PATH_MTU: c_int = 1 << 8;
pub(super) const QP_TIMEOUT: c_int = 1 << 9;
pub(super) const QP_RETRY_CNT: c_int = 1 << 10;
pub(super) const QP_RNR_RETRY: c_int = 1 << 11;
pub(super) const QP_RQ_PSN: c_int = 1 << 12;
pub(super) const QP_MAX_QP_RD_ATOMIC: c_int = 1 << 13;
pub(super) const QP_MIN_RNR_TIMER: c_int = 1 << 15;
pub(super) const QP_SQ_PSN: c_int = 1 << 16;
pub(super) const QP_MAX_DEST_RD_ATOMIC: c_int = 1 << 17;
pub(super) const QP_CAP: c_int = 1 << 19;
pub(super) const QP_DEST_QPN: c_int = 1 << 20;

/// `IBV_ACCESS_LOCAL_WRITE`.
pub(super) const ACCESS_LOCAL_WRITE: c_int = 1;
/// `IBV_PORT_ACTIVE`.
pub(super) const PORT_ACTIVE: u32 = 4;
/// `IBV_MTU_4096`; each step down halves the bytes, to `IBV_MTU_256` = 1.
pub(super) const MTU_4096: u32 = 5;

/// `IBV_WC_*`.
pub(super) const WC_SUCCESS: u32 = 0;
pub(super) const WC_RETRY_EXC_ERR: u32 = 12;

/// The numbers that could differ on macOS: see the top of the file.
pub(super) mod platform {
    #[cfg(not(target_os = "macos"))]
    mod numbers {
        /// `IBV_WR_SEND`.
        pub(in crate::rdma) const WR_SEND: u32 = 2;
        /// `IBV_SEND_SIGNALED`.
        pub(in crate::rdma) const SEND_SIGNALED: u32 = 2;
        /// Routers that a packet may pass: RoCE v2 can be routed.
        pub(in crate::rdma) const HOP_LIMIT: u8 = 64;
    }

    // Not confirmed on a Mac: rdma-core's. TN3205: Thunderbolt's RDMA is not routable; JACCL allows
    // one hop.
    #[cfg(target_os = "macos")]
    mod numbers {
        pub(in crate::rdma) const WR_SEND: u32 = 2;
        pub(in crate::rdma) const SEND_SIGNALED: u32 = 2;
        pub(in crate::rdma) const HOP_LIMIT: u8 = 1;
    }

    pub(in crate::rdma) use numbers::{HOP_LIMIT, SEND_SIGNALED, WR_SEND};
}

/// `enum ibv_wc_status` as text: what the specification says, and what it means here.
pub(super) fn status_name(status: u32) -> &'static str {
    const NAMES: [&str; 22] = [
        "success",
        "local length error: a message is longer than the posted receive",
        "local queue pair operation error",
        "local end-to-end context error",
        "local protection error: memory that is not registered",
        "flushed: the queue pair failed before",
        "memory window bind error",
        "bad response",
        "local access error",
        "remote invalid request: the peer's receive is shorter than the message",
        "remote access error",
        "remote operation error",
        "retries exceeded: the peer does not answer",
        "receiver-not-ready retries exceeded: the peer has no receive posted",
        "local reliable datagram violation",
        "remote invalid reliable datagram request",
        "remote aborted",
        "invalid end-to-end context number",
        "invalid end-to-end context state",
        "fatal error of the device",
        "response timeout",
        "general error",
    ];
    NAMES.get(status as usize).copied().unwrap_or("unknown status")
}

/// `struct ibv_context_ops`: functions that the header calls inline, by place.
#[repr(C)]
pub(super) struct ContextOps {
    pub(super) before_poll_cq: [*mut c_void; 11],
    // SAFETY: these are types only; who calls such a function says why it may, in `verbs.rs`.
    pub(super) poll_cq: Option<unsafe extern "C" fn(*mut CompletionQueue, c_int, *mut WorkCompletion) -> c_int>,
    pub(super) before_post_send: [*mut c_void; 13],
    pub(super) post_send: Option<unsafe extern "C" fn(*mut Qp, *mut SendRequest, *mut *mut SendRequest) -> c_int>,
    pub(super) post_recv: Option<unsafe extern "C" fn(*mut Qp, *mut ReceiveRequest, *mut *mut ReceiveRequest) -> c_int>,
    pub(super) after_post_recv: [*mut c_void; 5],
}

/// `struct ibv_context`, up to what is used.
#[repr(C)]
pub(super) struct Context {
    pub(super) device: *mut Device,
    pub(super) ops: ContextOps,
}

/// `struct ibv_device`, seen only through a pointer.
#[repr(C)]
pub(super) struct Device {
    opaque: [u8; 0],
}

/// `struct ibv_pd`, seen only through a pointer.
#[repr(C)]
pub(super) struct Pd {
    opaque: [u8; 0],
}

/// `struct ibv_cq`, seen only through a pointer.
#[repr(C)]
pub(super) struct CompletionQueue {
    opaque: [u8; 0],
}

/// `struct ibv_qp`, up to what is used.
#[repr(C)]
pub(super) struct Qp {
    pub(super) context: *mut Context,
    pub(super) qp_context: *mut c_void,
    pub(super) pd: *mut Pd,
    pub(super) send_cq: *mut CompletionQueue,
    pub(super) recv_cq: *mut CompletionQueue,
    pub(super) srq: *mut c_void,
    pub(super) handle: u32,
    pub(super) qp_num: u32,
}

/// `struct ibv_mr`.
#[repr(C)]
pub(super) struct Mr {
    pub(super) context: *mut Context,
    pub(super) pd: *mut Pd,
    pub(super) addr: *mut c_void,
    pub(super) length: usize,
    pub(super) handle: u32,
    pub(super) lkey: u32,
    pub(super) rkey: u32,
}

/// `union ibv_gid`; the union holds 64-bit integers, hence the alignment.
#[repr(C, align(8))]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Gid {
    pub(super) raw: [u8; 16],
}

/// `struct ibv_port_attr`, longer than the header's: older and newer libraries write more or less
/// of it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct PortAttr {
    pub(super) state: u32,
    pub(super) max_mtu: u32,
    pub(super) active_mtu: u32,
    pub(super) gid_tbl_len: c_int,
    pub(super) port_cap_flags: u32,
    pub(super) max_msg_sz: u32,
    pub(super) bad_pkey_cntr: u32,
    pub(super) qkey_viol_cntr: u32,
    pub(super) pkey_tbl_len: u16,
    pub(super) lid: u16,
    pub(super) sm_lid: u16,
    pub(super) rest: [u32; 12],
}

/// `struct ibv_device_attr`, longer than the header's.
#[repr(C)]
pub(super) struct DeviceAttr {
    pub(super) fw_ver: [c_char; 64],
    pub(super) guids: [u64; 2],
    pub(super) max_mr_size: u64,
    pub(super) page_size_cap: u64,
    pub(super) vendor: [u32; 3],
    pub(super) max_qp: c_int,
    pub(super) max_qp_wr: c_int,
    pub(super) device_cap_flags: u32,
    pub(super) max_sge: c_int,
    pub(super) max_sge_rd: c_int,
    pub(super) max_cq: c_int,
    pub(super) max_cqe: c_int,
    pub(super) max_mr: c_int,
    pub(super) max_pd: c_int,
    pub(super) rest: [u32; 64],
}

impl Default for DeviceAttr {
    fn default() -> DeviceAttr {
        DeviceAttr {
            fw_ver: [0; 64],
            guids: [0; 2],
            max_mr_size: 0,
            page_size_cap: 0,
            vendor: [0; 3],
            max_qp: 0,
            max_qp_wr: 0,
            device_cap_flags: 0,
            max_sge: 0,
            max_sge_rd: 0,
            max_cq: 0,
            max_cqe: 0,
            max_mr: 0,
            max_pd: 0,
            rest: [0; 64],
        }
    }
}

/// `struct ibv_qp_cap`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QpCap {
    pub(super) max_send_wr: u32,
    pub(super) max_recv_wr: u32,
    pub(super) max_send_sge: u32,
    pub(super) max_recv_sge: u32,
    pub(super) max_inline_data: u32,
}

/// `struct ibv_qp_init_attr`.
#[repr(C)]
pub(super) struct QpInitAttr {
    pub(super) qp_context: *mut c_void,
    pub(super) send_cq: *mut CompletionQueue,
    pub(super) recv_cq: *mut CompletionQueue,
    pub(super) srq: *mut c_void,
    pub(super) cap: QpCap,
    pub(super) qp_type: u32,
    pub(super) sq_sig_all: c_int,
}

/// `struct ibv_global_route`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct GlobalRoute {
    pub(super) dgid: Gid,
    pub(super) flow_label: u32,
    pub(super) sgid_index: u8,
    pub(super) hop_limit: u8,
    pub(super) traffic_class: u8,
}

/// `struct ibv_ah_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct AddressAttr {
    pub(super) grh: GlobalRoute,
    pub(super) dlid: u16,
    pub(super) sl: u8,
    pub(super) src_path_bits: u8,
    pub(super) static_rate: u8,
    pub(super) is_global: u8,
    pub(super) port_num: u8,
}

/// `struct ibv_qp_attr`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct QpAttr {
    pub(super) qp_state: u32,
    pub(super) cur_qp_state: u32,
    pub(super) path_mtu: u32,
    pub(super) path_mig_state: u32,
    pub(super) qkey: u32,
    pub(super) rq_psn: u32,
    pub(super) sq_psn: u32,
    pub(super) dest_qp_num: u32,
    pub(super) qp_access_flags: u32,
    pub(super) cap: QpCap,
    pub(super) ah_attr: AddressAttr,
    pub(super) alt_ah_attr: AddressAttr,
    pub(super) pkey_index: u16,
    pub(super) alt_pkey_index: u16,
    pub(super) en_sqd_async_notify: u8,
    pub(super) sq_draining: u8,
    pub(super) max_rd_atomic: u8,
    pub(super) max_dest_rd_atomic: u8,
    pub(super) min_rnr_timer: u8,
    pub(super) port_num: u8,
    pub(super) timeout: u8,
    pub(super) retry_cnt: u8,
    pub(super) rnr_retry: u8,
    pub(super) alt_port_num: u8,
    pub(super) alt_timeout: u8,
    pub(super) rate_limit: u32,
}

/// `struct ibv_sge`.
#[repr(C)]
pub(super) struct ScatterGather {
    pub(super) addr: u64,
    pub(super) length: u32,
    pub(super) lkey: u32,
}

/// `struct ibv_send_wr`.
#[repr(C)]
pub(super) struct SendRequest {
    pub(super) wr_id: u64,
    pub(super) next: *mut SendRequest,
    pub(super) sg_list: *mut ScatterGather,
    pub(super) num_sge: c_int,
    pub(super) opcode: u32,
    pub(super) send_flags: u32,
    pub(super) imm_data: u32,
    /// The unions for other operations than SEND.
    pub(super) unused: [u64; 11],
}

/// `struct ibv_recv_wr`.
#[repr(C)]
pub(super) struct ReceiveRequest {
    pub(super) wr_id: u64,
    pub(super) next: *mut ReceiveRequest,
    pub(super) sg_list: *mut ScatterGather,
    pub(super) num_sge: c_int,
}

/// `struct ibv_wc`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct WorkCompletion {
    pub(super) wr_id: u64,
    pub(super) status: u32,
    pub(super) opcode: u32,
    pub(super) vendor_err: u32,
    pub(super) byte_len: u32,
    pub(super) imm_data: u32,
    pub(super) qp_num: u32,
    pub(super) src_qp: u32,
    pub(super) wc_flags: u32,
    pub(super) pkey_index: u16,
    pub(super) slid: u16,
    pub(super) sl: u8,
    pub(super) dlid_path_bits: u8,
}
