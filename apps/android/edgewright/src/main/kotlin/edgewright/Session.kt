package edgewright

import ai.onnxruntime.OnnxJavaType
import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtEnvironment
import ai.onnxruntime.OrtException
import ai.onnxruntime.OrtSession
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder

/** Where states live. Java's direct buffers do on a desktop; on Android those are on the heap, so `edgewright.android` has another. */
interface Buffers {
    /** Zeros, in native order and outside of the heap. */
    fun take(bytes: Int): ByteBuffer

    fun give(buffer: ByteBuffer)

    object Direct : Buffers {
        override fun take(bytes: Int): ByteBuffer = ByteBuffer.allocateDirect(bytes).order(ByteOrder.nativeOrder())

        override fun give(buffer: ByteBuffer) = Unit
    }
}

private fun typeNamed(name: String): OnnxJavaType = when (name) {
    "float32" -> OnnxJavaType.FLOAT
    "float16" -> OnnxJavaType.FLOAT16
    "int64" -> OnnxJavaType.INT64
    "int32" -> OnnxJavaType.INT32
    "int8" -> OnnxJavaType.INT8
    "bool" -> OnnxJavaType.BOOL
    else -> fail("app.json has a tensor of the type $name, which this client does not know; embed the bundle again")
}

/** What the runtime does; its own message in one line where it fails. */
internal inline fun <T> runtime(what: String, act: () -> T): T = try {
    act()
} catch (error: OrtException) {
    throw EdgewrightException("$what: ${error.message.orEmpty().replace(Regex("\\s+"), " ").take(300)}", error)
}

/** A tensor over a buffer of ours. */
internal class Tensor(dtype: String, shape: LongArray, private val buffers: Buffers) : AutoCloseable {
    val buffer: ByteBuffer
    val value: OnnxTensor

    init {
        val type = typeNamed(dtype)
        val bytes = shape.fold(type.size.toLong()) { a, b -> Math.multiplyExact(a, b) }
        if (bytes > Int.MAX_VALUE) fail("a state takes $bytes bytes, and 2 GiB are the most; export with a shorter --max-context")
        buffer =
            try {
                buffers.take(bytes.toInt())
            } catch (error: OutOfMemoryError) {
                throw EdgewrightException(
                    "$bytes bytes for a state are not to be had; ask for fewer new tokens, or close other apps",
                    error,
                )
            }
        value = runtime("a tensor") { OnnxTensor.createTensor(OrtEnvironment.getEnvironment(), buffer, shape, type) }
    }

    fun putInts(values: IntArray) = buffer.asLongBuffer().let { to -> values.forEach { to.put(it.toLong()) } }

    fun putFloats(values: FloatArray) {
        buffer.asFloatBuffer().put(values)
    }

    fun fill(byte: Byte) {
        for (i in 0 until buffer.capacity()) buffer.put(i, byte)
    }

    override fun close() {
        value.close()
        buffers.give(buffer)
    }
}

/** What an answer holds on to until it is closed. */
internal class Held(private val buffers: Buffers) : AutoCloseable {
    private val open = mutableListOf<AutoCloseable>()

    fun tensor(dtype: String, vararg shape: Long): Tensor = Tensor(dtype, shape, buffers).also { open += it }

    fun ints(values: IntArray, vararg shape: Long): Tensor = tensor("int64", *shape).also { it.putInts(values) }

    fun <T : AutoCloseable> keep(value: T): T = value.also { open += it }

    override fun close() {
        open.asReversed().forEach { it.close() }
        open.clear()
    }
}

internal class Graph(val spec: GraphSpec, folder: File, threads: Int) : AutoCloseable {
    private val session: OrtSession

    init {
        val environment = OrtEnvironment.getEnvironment()
        val file = File(folder, spec.file)
        session =
            OrtSession.SessionOptions().use { options ->
                runtime("$file does not open in ONNX Runtime ${environment.version} (it needs ${spec.oldestRuntime})") {
                    options.setIntraOpNumThreads(threads)
                    options.setInterOpNumThreads(1)
                    options.setSessionLogLevel(ai.onnxruntime.OrtLoggingLevel.ORT_LOGGING_LEVEL_FATAL)
                    environment.createSession(file.path, options) // a path, not bytes: the weights are mapped
                }
            }
    }

    fun reads(name: String) = spec.inputs.any { it.name == name }

    /** The outputs of one call, in the runtime's own memory: close the result. */
    fun runOnce(given: Map<String, OnnxTensor>, how: OrtSession.RunOptions): OrtSession.Result =
        runtime("the model does not run") { session.run(given.filterKeys(::reads), session.outputNames, how) }

    fun run(given: Map<String, OnnxTensor>, into: Map<String, OnnxTensor>, how: OrtSession.RunOptions) =
        runtime("the model does not run") { session.run(given, emptySet(), into, how).close() }

    override fun close() = session.close()
}

/**
 * A graph with states, called again and again. A KV cache is one buffer, written in place; other states have two that change places.
 *
 * given: inputs that stay: states that the graph only reads, and the like.
 */
internal class Calls(private val graph: Graph, capacity: Int, given: Map<String, OnnxTensor>, held: Held) {
    private class Turn(val inputs: MutableMap<String, OnnxTensor>, val outputs: MutableMap<String, OnnxTensor>)

    private val turns: List<Turn>
    private var next = 0

    init {
        val updated = graph.spec.states.filter { it.updated }
        val read = graph.spec.inputs.map { it.name } + graph.spec.states.filter { !it.updated }.map { it.name }
        val fixed = given.filterKeys { it in read }
        turns = List(if (updated.any { !it.kv }) 2 else 1) { Turn(fixed.toMutableMap(), mutableMapOf()) }
        for (state in updated) {
            val one = held.tensor(state.dtype, *state.sized(capacity)).value
            val two = if (state.kv) one else held.tensor(state.dtype, *state.sized(capacity)).value
            turns.forEachIndexed { i, turn ->
                turn.inputs[state.name] = if (i == 0) one else two
                turn.outputs["${state.name}_out"] = if (i == 0) two else one
            }
        }
    }

    fun input(name: String, tensor: Tensor) = turns.forEach { it.inputs[name] = tensor.value }

    fun output(name: String, tensor: Tensor) = turns.forEach { it.outputs[name] = tensor.value }

    fun run(how: OrtSession.RunOptions) {
        graph.run(turns[next].inputs, turns[next].outputs, how)
        next = (next + 1) % turns.size
    }
}
