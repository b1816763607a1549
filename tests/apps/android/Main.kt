// A command line over the Android client's core, for tests on a desktop's JVM. One line of an error and 2, as the C++ client.

import edgewright.Answer
import edgewright.Bench
import edgewright.ContextMemory
import edgewright.Download
import edgewright.Downloader
import edgewright.EdgewrightException
import edgewright.Event
import edgewright.GenerateOptions
import edgewright.Installer
import edgewright.LoadOptions
import edgewright.Model
import edgewright.Shipped
import edgewright.Traces
import edgewright.app.Session
import kotlinx.coroutines.flow.collect
import kotlinx.coroutines.flow.first
import kotlinx.coroutines.flow.takeWhile
import kotlinx.coroutines.launch
import kotlinx.coroutines.runBlocking
import kotlinx.coroutines.withTimeout
import java.io.File

/** Each line of the script is a command with arguments, separated by tabs; \n and \t in them are escaped. */
private class Script(private val options: LoadOptions) {
    private var folder = ""
    private var opened: Model? = null
    private var memory: ContextMemory? = null
    private val model get() = opened ?: throw EdgewrightException("no model is open")

    fun run(words: List<String>) {
        val argument = words.getOrElse(1) { "" }
        when (words[0]) {
            "open" -> {
                opened?.close()
                opened = null
                opened = Model.open(File(argument), LoadOptions(options.threads, options.checkHashes, words.getOrNull(2)?.toLong()))
                folder = argument
                memory = null
            }

            "trace" -> trace(File(argument.ifEmpty { "$folder/${Traces.FILE}" }))

            "context" -> memory = if (argument.isEmpty()) null else model.readContext(argument)

            "prompt" -> say(model.readPrompt(argument, words.getOrNull(4) != "plain"), generate(words))

            "ids" -> say(ints(argument), generate(words))

            "cancel" -> cancel(argument, words[2].toInt())

            "stop" -> stop(argument, words[2].toLong())

            "busy" -> busy(argument)

            "bench" -> Bench(model, argument.toInt(), words[2].toInt(), 2).run(::println)

            "install" -> install(File(argument), File(words[2]))

            "reopen" -> Installer(Folder(File(argument)), File(words[2])).open().use { println(it.app.name) }

            "session" -> session(File(argument), File(words[2]), words[3], words.getOrElse(4) { "" })

            "fetch" -> fetch(File(argument), File(words[2]))

            else -> throw EdgewrightException("there is no command ${words[0]}")
        }
    }

    private fun ints(text: String) = text.split(',').map { it.toInt() }.toIntArray()

    private fun generate(words: List<String>) = GenerateOptions(
        maxNewTokens = words.getOrNull(2)?.toIntOrNull(),
        stops = listOfNotNull(words.getOrNull(3)?.ifEmpty { null }),
        chat = words.getOrNull(4) != "plain",
        sampling = words.getOrNull(5)?.toDoubleOrNull()?.let { model.app.sampling.copy(temperature = it, topP = 0.9, seed = 1) },
        memory = memory,
    )

    /** The same answer by the flow, piece by piece, as by the blocking call: text, ending, tokens, pieces. */
    private fun say(prompt: IntArray, options: GenerateOptions) = runBlocking {
        val pieces = mutableListOf<String>()
        var answer: Answer? = null
        model.stream(prompt, options).collect {
            when (it) {
                is Event.Piece -> pieces += it.text
                is Event.Done -> answer = it.answer
            }
        }
        val blocking = model.answer(prompt, options)
        check(pieces.joinToString("") == blocking.text)
        check(blocking.tokens.contentEquals(answer?.tokens))
        println(listOf(blocking.text, blocking.ending, blocking.tokens.joinToString(","), pieces.joinToString("|")).joinToString("\t"))
    }

    private fun trace(file: File) {
        val report = Traces.check(model, file)
        report.wrong.forEach(System.err::println)
        println(report)
        if (report.wrong.isNotEmpty()) throw EdgewrightException("the traces differ")
    }

    /** Cancels the collector behind some pieces; the model is free then. */
    private fun cancel(prompt: String, pieces: Int) = runBlocking {
        var seen = 0
        val job = launch {
            model.stream(prompt).collect {
                if (it is Event.Piece &&
                    ++seen == pieces
                ) {
                    throw kotlinx.coroutines.CancellationException("enough")
                }
            }
        }
        job.join()
        check(job.isCancelled)
        model.stream(prompt).first()
        println("cancelled behind $seen, and free")
    }

    /** Cancels in the middle of reading a long prompt, from another thread. */
    private fun stop(ids: String, after: Long) = runBlocking {
        val prompt = ints(ids)
        var pieces = 0
        val job = launch(kotlinx.coroutines.Dispatchers.Default) { model.stream(prompt).takeWhile { true }.collect { pieces++ } }
        kotlinx.coroutines.delay(after)
        job.cancel()
        withTimeout(60_000) { job.join() }
        println("stopped, ${if (pieces == 0) "nothing said" else "$pieces events"}")
        model.stream(prompt.copyOf(1), GenerateOptions(maxNewTokens = 1)).collect { }
    }

    private fun busy(prompt: String) {
        val ids = model.readPrompt(prompt)
        model.start(ids, 1).use { model.answer(prompt) }
    }

    private fun fetch(description: File, folder: File) = runBlocking {
        val downloader = Downloader(folder, Download.read(description), 5_000)
        var last = 0L
        downloader.fetch().collect { last = it.done }
        println("fetched $last, ${if (downloader.whole) "whole" else "not whole"}")
    }

    /** A folder stands for the assets of an app. */
    private class Folder(private val folder: File) : Shipped {
        override val names = folder.list().orEmpty().toSet()

        override fun open(name: String) = File(folder, name).inputStream()
    }

    private fun install(assets: File, parent: File) = runBlocking {
        val installer = Installer(Folder(assets), parent)
        installer.prepare().collect { }
        println(installer.folder)
    }

    /** The sample's screen without a screen: opened, asked, measured, checked, closed, opened again. */
    private fun session(assets: File, parent: File, prompt: String, context: String) = runBlocking {
        val installer = Installer(Folder(assets), parent)
        val session = Session(this, installer::prepare, installer::open) { println("log: $it") }
        session.ask(prompt).join()
        println("early: ${session.screen.value.status}")
        session.start().join()
        check(session.screen.value.ready)
        session.ask(prompt, context).join()
        println("${session.screen.value.text}\n${session.screen.value.status.substringAfter("ended")}")
        session.bench(8, 4, 1, File("$parent.md")) { "NONE" }.join()
        session.check(File(installer.folder, Traces.FILE)).join()
        session.ask(prompt, context)
        session.stop()
        session.close().join()
        check(!session.screen.value.ready)
        session.start().join()
        check(session.screen.value.ready && !session.screen.value.busy)
    }
}

fun main(arguments: Array<String>) {
    val script = Script(LoadOptions(threads = 1, checkHashes = "--no-check" !in arguments))
    for (line in generateSequence(::readlnOrNull)) {
        val words = line.split('\t').map { it.replace("\\n", "\n").replace("\\t", "\t") }
        try {
            script.run(words)
        } catch (error: EdgewrightException) {
            println("error: ${error.message}")
        }
        println("----")
    }
    System.out.flush()
    Runtime.getRuntime().halt(0) // the shims of the C library are not for a JVM that ends in order
}
